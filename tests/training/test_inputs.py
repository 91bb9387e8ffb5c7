"""What a run reads from: a mixture goes on where a checkpoint left it, with the checkpoint's statistics."""

import dataclasses
import functools
import itertools
import json

import jax
import numpy as np
import pytest

from pi0_jax import pi0
from pi0_jax.config import (
    AugmentConfig,
    Autoregressive,
    DataConfig,
    DatasetConfig,
    Fast,
    Joint,
    PolicyConfig,
    TrainConfig,
)
from pi0_jax.data.fast import FastCodec
from pi0_jax.data.normalization import semantics_from_json, stats_from_json
from pi0_jax.sampler import Euler, Greedy
from pi0_jax.training.inputs import Inputs, load_inputs, open_held_out
from pi0_jax.training.loop import _describe
from pi0_jax.training.program import build
from pi0_jax.training.resolve import resolve
from tests.conftest import tiny_config
from tests.data.conftest import write
from tests.data.formats import RLDS_KEYS, write_rlds


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> TrainConfig:
    pytest.importorskip("tensorflow_datasets")
    folder = tmp_path_factory.mktemp("inputs")
    datasets = (
        DatasetConfig(str(write(folder / "lerobot")), weight=0.5),
        DatasetConfig(str(write_rlds(folder / "rlds")), weight=0.5, keys=RLDS_KEYS),
    )
    model = tiny_config("pi0", cameras=("top",), action_dim=8, vocab_size=512, prompt_length=16)
    data = DataConfig(datasets=datasets, validation_share=0.4)
    return TrainConfig(policy=PolicyConfig(robot="tabletop", model=model), data=data, batch_size=8)


def load(config: TrainConfig, **assets) -> Inputs:
    return load_inputs(resolve(config), **assets)


def test_held_out_demonstrations_open_from_a_checkpoint_as_in_training(config, tmp_path):
    assets = load(config).assets
    assert assets.train is not None
    held_out = open_held_out(assets.train.data, assets.policy)
    assert [type(each.source).__name__ for each in held_out] == ["LeRobotDataset", "Renamed"]
    assert all(0 < len(each.held_out) < each.source.num_episodes for each in held_out)
    other = dataclasses.replace(config.data, validation_path=str(write(tmp_path / "held_out", (5,))))
    (each,) = open_held_out(other, config.policy)
    assert each.held_out.tolist() == [0]
    assert open_held_out(dataclasses.replace(config.data, validation_share=0.0), config.policy) == []


def test_a_camera_that_is_misspelt_is_named_and_none_at_all_is_refused(tmp_path, caplog):
    model = tiny_config("pi0", cameras=("top", "tol"), action_dim=8, vocab_size=512, prompt_length=32)
    config = TrainConfig(
        policy=PolicyConfig(robot="tabletop", model=model), data=DataConfig(str(write(tmp_path / "data"))), batch_size=2
    )
    caplog.set_level("INFO")
    run = resolve(config, jax.devices()[:1])
    _describe(run, build(run, lambda key, batch: batch))
    assert "cameras: top" in caplog.messages
    assert "names tol, which no robot of this run has, and leaves out tool, which there are" in caplog.text
    blind = dataclasses.replace(model, cameras=("front", "wrist"))
    with pytest.raises(ValueError, match=r"\['front', 'wrist'\], is one of the robot's, \['tool', 'top'\]"):
        resolve(dataclasses.replace(config, policy=PolicyConfig(robot="tabletop", model=blind)))


def test_what_no_robot_has_and_what_no_prompt_needs_is_left_out_and_the_loss_stays(tmp_path):
    model = tiny_config("pi0", cameras=("top", "wrist", "tool"), action_dim=8, vocab_size=512, prompt_length=32)
    data = DataConfig(str(write(tmp_path / "data")), prompt_buckets=(16,))
    config = TrainConfig(policy=PolicyConfig(robot="tabletop", model=model), data=data, batch_size=2)
    resolved = resolve(config, jax.devices()[:1])
    inputs = load_inputs(resolved)
    batch = next(inputs.loader)
    assert list(batch.observation.images) == ["top", "tool"]
    assert batch.observation.prompt.shape == (2, 16)
    assert inputs.assets.policy.model == model  # what a policy of another robot may need

    program = build(resolved, inputs.augment)
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda x: 0.2 * random.standard_normal(x.shape, np.float32), program.shapes.params)
    value = program.evaluate(params, program.place(batch), jax.random.key(0))
    seen = batch.observation
    padded = seen._replace(
        images=seen.images | {"wrist": np.full_like(seen.images["top"], 7)},
        image_masks=seen.image_masks | {"wrist": np.zeros(2, bool)},
        prompt=np.pad(seen.prompt, ((0, 0), (0, 16))),
        prompt_mask=np.pad(seen.prompt_mask, ((0, 0), (0, 16))),
    )
    objective = pi0.make_objective(config.policy.objective, model)
    whole, _ = jax.jit(functools.partial(pi0.loss, objective))(
        params, batch._replace(observation=padded), jax.random.key(0)
    )
    assert float(value) == pytest.approx(float(whole), rel=1e-5)


def test_the_stream_of_a_mixture_after_a_resume_is_that_of_a_run_that_never_stopped(config):
    whole = load(config)
    batches = list(itertools.islice(whole.loader, 7))
    stopped = load(config)
    list(itertools.islice(stopped.loader, 3))
    state = json.loads(json.dumps(stopped.loader.get_state()))  # as a checkpoint keeps it
    resumed = load(config, resumed=stopped.assets)
    resumed.loader.set_state(state)
    jax.tree.map(np.testing.assert_array_equal, batches[3:], list(itertools.islice(resumed.loader, 4)))
    assert whole.validation is not None
    assert resumed.validation is not None
    jax.tree.map(np.testing.assert_array_equal, list(whole.validation()), list(resumed.validation()))


def test_a_checkpoint_keeps_all_statistics_of_a_mixture_and_the_meaning_of_actions(config):
    datasets = (config.data.datasets[0], dataclasses.replace(config.data.datasets[1], stats="records"))
    inputs = load(dataclasses.replace(config, data=dataclasses.replace(config.data, datasets=datasets)))
    content = json.loads(json.dumps(inputs.assets.norm_stats))
    assert semantics_from_json(content) == {"tabletop": ("absolute",) * 3}
    np.testing.assert_array_equal(stats_from_json(content)["state"].mean, inputs.stats["state"].mean)
    assert len(stats_from_json(content, "records")["state"].mean) == 6
    with pytest.raises(ValueError, match="no statistics of 'droid'"):
        stats_from_json(content, "droid")


def test_statistics_of_other_semantics_or_of_nobody_are_refused(config, tmp_path):
    inputs = load(config)
    path = tmp_path / "norm_stats.json"
    path.write_text(json.dumps(inputs.assets.norm_stats))
    given = dataclasses.replace(config, data=dataclasses.replace(config.data, norm_stats=str(path)))
    again = load(given)
    np.testing.assert_array_equal(again.stats["actions"].q99, inputs.stats["actions"].q99)
    policy = dataclasses.replace(config.policy, action_semantics={"tabletop": ("relative",) * 3})
    with pytest.raises(ValueError, match="Compute the statistics again"):
        load(dataclasses.replace(given, policy=policy))
    named = tuple(dataclasses.replace(d, stats="other") for d in config.data.datasets)
    other = dataclasses.replace(config, data=dataclasses.replace(config.data, datasets=named))
    with pytest.raises(ValueError, match="no dataset has statistics called 'tabletop'"):
        load(other)


def test_symmetries_need_one_set_of_statistics(config):
    datasets = (config.data.datasets[0], dataclasses.replace(config.data.datasets[1], stats="records"))
    data = dataclasses.replace(config.data, datasets=datasets)
    with pytest.raises(ValueError, match="one set of statistics"):
        load(dataclasses.replace(config, data=data, augment=AugmentConfig(square_symmetries=True)))


@pytest.mark.parametrize("objective", [Autoregressive(codec=Fast(skip=8, max_tokens=40)), Joint(codec=Fast(skip=8))])
def test_a_codec_is_fitted_kept_and_read_again(tmp_path, objective, caplog):
    pytest.importorskip("tokenizers")
    decodes = isinstance(objective, Autoregressive)
    model = tiny_config(
        "pi0_fast" if decodes else "pi05", cameras=("top",), action_dim=8, vocab_size=1800, prompt_length=64
    )
    policy = PolicyConfig(
        robot="tabletop",
        model=model,
        objective=objective,
        sampler=Greedy() if decodes else Euler(),
        normalization="quantile",
    )
    config = TrainConfig(policy=policy, data=DataConfig(str(write(tmp_path / "data"))), batch_size=8)
    inputs = load(config)
    codec = FastCodec.from_files(inputs.assets.codec)
    assert (codec.horizon, codec.dims) == (6, 3)
    batch = next(inputs.loader)
    assert batch.targets.tokens.shape == (8, objective.target_length)
    assert batch.targets.is_action.any(1).all()
    assert ((batch.targets.tokens > 1800 - 9 - codec.num_codes) & batch.targets.is_action).any(1).all()
    bare = inputs.assets._replace(codec=None)
    assert load(config, initial=bare).assets.codec == inputs.assets.codec
    assert "the weights come without a codec" in caplog.text
    codec.save(tmp_path / "codec")
    other = dataclasses.replace(config, data=dataclasses.replace(config.data, codec=str(tmp_path / "codec")))
    assert load(other).assets.codec == inputs.assets.codec
    assert load(config, resumed=inputs.assets).assets.codec == inputs.assets.codec
    small = dataclasses.replace(policy, model=dataclasses.replace(model, vocab_size=600))
    with pytest.raises(ValueError, match=r"vocab_size is 600, and action tokens take .* --data.codes 300"):
        load(dataclasses.replace(config, policy=small))
