"""An exported policy runs without this package, and gives its numbers."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from pi0_jax.data.observation import check_observation
from pi0_jax.data.transform import make_transform, to_observation
from pi0_jax.inference.export import export, load
from pi0_jax.inference.policy import Policy
from pi0_jax.sampler import Euler
from tests.policies import TINY

pytest.importorskip("flatbuffers", reason="exporting needs the extra `export`")


@pytest.fixture(scope="module")
def policy(checkpoint_folder):
    return Policy.load(checkpoint_folder, sampler=Euler(4))


@pytest.fixture(scope="module")
def folder(policy, tmp_path_factory):
    return export(policy, tmp_path_factory.mktemp("export") / "policy", [1, 2], ["cpu", "cuda"])


def test_read_back_it_gives_the_policys_actions(policy, folder):
    example = policy.robot.example()
    rng = np.random.default_rng(0)
    raw = [example | {"state": rng.normal(size=6).astype(np.float32) / 10} for _ in range(2)]
    noise = rng.normal(size=(2, TINY.model.action_horizon, TINY.model.action_dim)).astype(np.float32)
    expected = policy.infer_batch(raw, jax.random.split(jax.random.key(0), 2), noise=noise)
    transform = make_transform(policy.config, policy.robot, policy.normalization, policy.tokenizer)
    samples = [to_observation(transform.forward(check_observation(x, policy.robot))) for x in raw]
    observation = jax.tree.map(lambda *x: np.stack(x), *samples)
    inputs = {f"images/{camera}": image for camera, image in observation.images.items()}
    inputs |= {"state": observation.state, "prompt": observation.prompt, "prompt_mask": observation.prompt_mask}
    actions = load(folder, 2)(inputs | {"noise": noise})
    to_robot = json.loads((folder / "interface.json").read_text())["normalization"]["actions"]
    got = np.array(to_robot["scale"]) * actions[..., :3] + to_robot["offset"]
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_its_own_instructions_run_it_where_this_package_is_not(folder):
    text = (folder / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    alone = f"import sys; sys.modules['pi0_jax'] = None\n{code}\nprint(actions.shape, bool(np.isfinite(actions).all()))"
    run = subprocess.run([sys.executable, "-c", alone], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == f"(1, {TINY.model.action_horizon}, {TINY.model.action_dim}) True"


def test_nothing_is_overwritten_or_left_half_written(policy, folder, tmp_path, monkeypatch):
    with pytest.raises(FileExistsError, match="choose another folder"):
        export(policy, folder)
    with pytest.raises(FileNotFoundError, match="no program for 3 observations; it has for 1, 2"):
        load(folder, 3)
    with pytest.raises(FileNotFoundError, match="no exported policy"):
        load(tmp_path)
    monkeypatch.setattr(Policy, "program", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(policy, tmp_path / "new")
    assert not list(tmp_path.iterdir())
