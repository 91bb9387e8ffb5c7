"""Configuration, statistics and tokenizer are plain files, and those of version 1 are read."""

from __future__ import annotations

import dataclasses
import json

import pytest

from pi0_jax import checkpoint
from pi0_jax.checkpoint import CheckpointError
from pi0_jax.config import Beta, ConditionDropout, Gaussian, Guidance
from pi0_jax.sampler import Euler


def test_assets_are_plain_files(run):
    assets = run / "checkpoints" / "30" / "assets"
    assert sorted(p.name for p in assets.iterdir() if p.name != "commit_success.txt") == [
        "config.json",
        "norm_stats.json",
        "tokenizer.model",
    ]
    assert '"variant": "pi05"' in (assets / "config.json").read_text()


def test_an_action_codec_lies_in_a_folder_of_its_own(copy):
    files = {"tokenizer.json": b"{}", "processor_config.json": b'{"scale": 10}'}
    assets = checkpoint.load_assets(copy)
    assert assets.codec is None
    folder = copy / "checkpoints" / "30" / "assets"
    checkpoint.write_assets(folder, assets._replace(codec=files))
    assert checkpoint.load_assets(copy) == assets._replace(codec=files)
    assert (folder / "fast" / "tokenizer.json").read_bytes() == b"{}"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"format_version": 2', '"format_version": 3', "format version 3, and .* reads 1 and 2"),
        ('"depth": 18', '"depht": 18', r"depht.*config\.policy\.model"),
        ('"pi05"', '"pi06"', "pi06"),
    ],
)
def test_a_config_of_another_version_is_refused(copy, old, new, message):
    file = copy / "checkpoints" / "30" / "assets" / "config.json"
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load_assets(copy)


def test_a_checkpoint_of_version_1_is_read(version1):
    checkpoint.verify(checkpoint.resolve(version1))
    assets = checkpoint.load_assets(version1)
    assert assets.train is not None
    assert assets.train.policy == assets.policy
    assert assets.policy.sampler == Euler(num_steps=3)
    assert assets.policy.guidance == Guidance(1.5, "prompt")
    assert assets.policy.objective == Gaussian(
        time=Beta(2.0), draws=2, regression_draw=True, regression_warmup_steps=2, dropout=ConditionDropout(prompt=0.1)
    )
    assert assets.train.optim.peak_lr == 1e-3
    assert "image_encoder" in checkpoint.restore_params(version1)


@pytest.mark.parametrize(("old", "new"), [("true", "full"), ("false", "none")])
def test_remat_of_the_first_checkpoints_was_a_truth_value(version1, old, new):
    file = checkpoint.resolve(version1) / "assets" / "config.json"
    content = file.read_text()
    assert '"remat": "none"' in content
    file.write_text(content.replace('"remat": "none"', f'"remat": {old}'))
    assert checkpoint.load_assets(version1).policy.model.remat == new


def test_a_policy_beside_foreign_weights_is_read_in_both_versions(version1):
    content = json.loads((checkpoint.resolve(version1) / "assets" / "config.json").read_text())["policy"]
    policy = checkpoint.policy_from_json(content)
    assert policy == dataclasses.replace(checkpoint.load_assets(version1).policy, objective=Gaussian())
    assert checkpoint.policy_from_json(checkpoint.policy_to_json(policy)) == policy
    with pytest.raises(CheckpointError, match="format version 9"):
        checkpoint.policy_from_json(content | {"format_version": 9})
