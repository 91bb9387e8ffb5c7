import dataclasses
import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pi0_jax.config import Compact, Cosine, Gaussian, Guidance, RealTimeConfig, Shortcut, Tokens
from pi0_jax.data.normalization import Normalization, NormStats, stats_to_json
from pi0_jax.data.poses import Pose
from pi0_jax.data.robot_json import robot_to_json
from pi0_jax.errors import UserError
from pi0_jax.inference.policy import Policy
from pi0_jax.inference.sampler import check_policy
from pi0_jax.inference.shapes import prompt_lengths
from pi0_jax.sampler import Euler, Greedy
from pi0_jax.sampler.ddim import DDIM
from pi0_jax.sampler.runge_kutta import Heun
from tests.policies import STATS, TINY, save_tiny_checkpoint, tiny_params


@pytest.fixture(scope="module")
def policy(checkpoint_folder):
    return Policy.load(checkpoint_folder)


@pytest.fixture
def observation(policy):
    rng = np.random.default_rng(0)
    example = policy.robot.example()
    images = {name: rng.integers(0, 256, image.shape, np.uint8) for name, image in example["images"].items()}
    return example | {"images": images, "state": rng.normal(size=6).astype(np.float32) / 10}


def test_a_chunk_has_the_horizon_and_the_robots_dimensions(policy, observation):
    chunk = policy.infer(observation)
    assert chunk.shape == (TINY.model.action_horizon, 3)
    assert chunk.dtype == np.float32
    np.testing.assert_array_equal(chunk, policy.infer(observation))
    assert np.abs(chunk - policy.infer(observation, seed=1)).max() > 0


def test_a_chunk_does_not_depend_on_the_rest_of_the_batch(policy, observation):
    other = observation | {"state": -observation["state"], "prompt": "push the blue ball onto the yellow circle"}
    keys = jax.random.split(jax.random.key(0), 3)
    together = policy.infer_batch([observation, other, observation], keys)
    for i, raw in enumerate([observation, other, observation]):
        np.testing.assert_allclose(together[i], policy.infer_batch([raw], keys[i : i + 1])[0], atol=1e-6)


def test_a_loaded_policy_equals_the_saved_one_from_the_step_folder_too(policy, checkpoint_folder, observation):
    from_step = Policy.load(checkpoint_folder / "checkpoints" / "3")
    np.testing.assert_array_equal(from_step.infer(observation), policy.infer(observation))


def test_denoising_ends_at_the_chunk(policy, observation):
    points = policy.denoise(observation, num_steps=5)
    assert points.shape == (6, TINY.model.action_horizon, 3)
    keys = jax.random.key(0)[None]
    np.testing.assert_allclose(points[-1], policy.infer_batch([observation], keys, num_steps=5)[0], atol=1e-6)


def test_a_second_call_compiles_nothing(policy, observation):
    policy.infer(observation)
    before = policy.compiled
    policy.infer(observation | {"prompt": "reach the red block"}, seed=5)
    assert policy.compiled == before


def test_steps_and_solver_can_be_chosen_at_loading(checkpoint_folder, observation, policy):
    other = Policy.load(checkpoint_folder, sampler=Heun(7))
    assert np.abs(other.infer(observation) - policy.infer(observation)).max() > 0
    with pytest.raises(UserError, match="num_steps 0"):
        Policy.load(checkpoint_folder, sampler=Heun(0))
    with pytest.raises(UserError, match="Gaussian is sampled by a solver, such as Euler"):
        Policy.load(checkpoint_folder, sampler=Greedy())


def test_bad_observations_are_refused_by_name(policy, observation):
    images = observation["images"]
    with pytest.raises(ValueError, match=r"lacks cameras \['tool'\].*Did you mean 'tool'"):
        policy.infer(observation | {"images": {"top": images["top"], "tol": images["tool"]}})
    with pytest.raises(ValueError, match=r"`state` has shape \(5,\)"):
        policy.infer(observation | {"state": observation["state"][:5]})
    with pytest.raises(ValueError, match="NaN or infinite"):
        policy.infer(observation | {"state": observation["state"] * np.nan})
    with pytest.raises(ValueError, match="expected uint8"):
        policy.infer(observation | {"images": images | {"top": images["top"].astype(np.int32)}})


def test_statistics_of_another_robot_are_refused(tmp_path):
    shorter = {"state": STATS["state"], "actions": type(STATS["actions"])(*(x[:2] for x in STATS["actions"]))}
    run = save_tiny_checkpoint(tmp_path, norm_stats=stats_to_json(shorter))
    with pytest.raises(ValueError, match="'actions' have 2 dimensions; the robot has 3: dx, dy, dz"):
        Policy.load(run)


def test_weights_without_statistics_are_refused(tmp_path):
    run = save_tiny_checkpoint(tmp_path, norm_stats=None)
    with pytest.raises(ValueError, match=r"holds weights but no norm_stats\.json"):
        Policy.load(run)


ARM = """
from pi0_jax.data.robots import Pose, Poses, Robot

names = ("x", "y", "z", "rx", "ry", "rz")
ROBOT = Robot("arm", {"front": "top"}, names, names, 10, (16, 16), semantics=("relative",) * 6,
              poses=Poses((Pose(0, "axis_angle"),), (Pose(0, "axis_angle"),)))
"""


def test_a_policy_of_poses_is_loaded_without_its_robots_file(tmp_path):
    path = tmp_path / "arm.py"
    path.write_text(ARM)
    policy = dataclasses.replace(TINY, robot=str(path), model=dataclasses.replace(TINY.model, action_dim=9))
    stats = {key: NormStats(np.zeros(9), np.ones(9)) for key in ("state", "actions")}
    semantics = {"arm": ("relative",) * 6}
    groups = {name: Normalization(stats, semantics["arm"]) for name in ("arm", "other")}
    changes = {"norm_stats": stats_to_json(stats, groups, semantics), "robot": robot_to_json(str(path))}
    run = save_tiny_checkpoint(tmp_path / "run", policy=policy, **changes)
    observation = {
        "images": {"top": np.zeros((16, 16, 3), np.uint8)},
        "state": np.array([0.1, 0.2, 0.3, 0.0, 3.0, 0.0], np.float32),
        "prompt": "go",
    }
    before = Policy.load(run).infer(observation)
    path.unlink()
    loaded = Policy.load(run)
    assert loaded.robot.poses.state == (Pose(0, "axis_angle"),)
    np.testing.assert_array_equal(loaded.infer(observation), before)
    path.write_text(ARM.replace("axis_angle", "euler_xyz"))  # for the next policy
    np.testing.assert_array_equal(Policy.load(run).infer(observation), before)


def test_missing_foreign_and_truncated_checkpoints_are_refused(tmp_path, checkpoint_folder):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Policy.load(tmp_path / "nowhere")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "model.safetensors").touch()
    with pytest.raises(ValueError, match="looks like PyTorch weights"):
        Policy.load(tmp_path / "foreign")
    broken = shutil.copytree(checkpoint_folder, tmp_path / "broken")
    largest = max((broken / "checkpoints/3/params").rglob("d/*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged"):
        Policy.load(broken)


def test_weights_that_have_changed_since_they_were_written_are_refused(tmp_path, checkpoint_folder):
    broken = shutil.copytree(checkpoint_folder, tmp_path / "broken")
    largest = max((broken / "checkpoints/3/params").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        Policy.load(broken)


def test_cudnn_attention_says_why_it_is_not_used(checkpoint_folder, caplog):
    assert Policy.load(checkpoint_folder, attention="cudnn").config.model.attention == "cudnn"
    assert "cudnn needs an NVIDIA GPU, and this is cpu" in caplog.text


def test_on_a_cpu_weights_are_float32_unless_told(tmp_path, checkpoint_folder):
    run = shutil.copytree(checkpoint_folder, tmp_path / "run")
    path = run / "checkpoints/3/assets/config.json"
    content = json.loads(path.read_text())
    content["policy"]["model"]["dtype"] = "bfloat16"
    path.write_text(json.dumps(content))
    for asked, expected in ((None, "float32"), ("bfloat16", "bfloat16"), ("float32", "float32")):
        loaded = Policy.load(run, dtype=asked)
        assert loaded.config.model.dtype == loaded.sampler.params["embedding"].dtype == expected


def test_a_config_that_does_not_fit_the_weights_is_refused(tmp_path, checkpoint_folder):
    run = shutil.copytree(checkpoint_folder, tmp_path / "run")
    path = run / "checkpoints/3/assets/config.json"
    content = json.loads(path.read_text())
    content["policy"]["model"]["depth"] = 3
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="does not fit this model"):
        Policy.load(run)
    content["policy"]["model"]["deph"] = content["policy"]["model"].pop("depth")
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="deph"):
        Policy.load(run)


def test_pi05_writes_the_state_into_the_prompt(tmp_path, observation):
    model = dataclasses.replace(TINY.model, variant="pi05", prompt_length=80)
    config = dataclasses.replace(TINY, model=model, normalization="quantile")
    run = save_tiny_checkpoint(tmp_path, policy=config)
    assert Policy.load(run).infer(observation).shape == (TINY.model.action_horizon, 3)


def test_one_program_serves_each_step_count_and_one_more_all_scales_of_guidance(policy, observation):
    keys = jax.random.key(0)[None]
    before = policy.compiled
    chunks = [policy.infer_batch([observation], keys, num_steps=n) for n in (2, 8, 2)]
    assert policy.compiled == before + 2
    np.testing.assert_array_equal(chunks[0], chunks[2])
    guided = [policy.infer_batch([observation], keys, num_steps=2, guidance_scale=s) for s in (0.0, 1.5, 3.0)]
    assert policy.compiled == before + 3
    assert np.abs(guided[0] - guided[2]).max() > 0
    # Scale 1 is no guidance, and costs none.
    np.testing.assert_array_equal(policy.infer_batch([observation], keys, num_steps=2, guidance_scale=1.0), chunks[0])
    assert policy.compiled == before + 3


def test_guidance_set_at_loading_is_that_of_the_call(checkpoint_folder, policy, observation):
    keys = jax.random.key(0)[None]
    guided = Policy.load(checkpoint_folder, guidance=Guidance(2.5, "both"))
    unguided = guided.infer_batch([observation], keys, guidance_scale=1.0)
    np.testing.assert_allclose(unguided, policy.infer_batch([observation], keys), atol=1e-6)
    assert np.abs(guided.infer_batch([observation], keys) - unguided).max() > 0
    # Guidance of scale 0 without prompt and images looks at neither.
    other = observation | {"images": {k: 255 - v for k, v in observation["images"].items()}, "prompt": "reach"}
    blind = [guided.infer_batch([raw], keys, guidance_scale=0.0) for raw in (observation, other)]
    np.testing.assert_allclose(*blind, atol=1e-6)


def test_paths_are_equally_spaced_in_time_whatever_the_grid(checkpoint_folder, policy, observation):
    keys = jax.random.split(jax.random.key(0), 2)
    warped = Policy.load(checkpoint_folder, sampler=Euler(3, grid_power=2.0))
    assert np.abs(warped.infer(observation) - policy.infer(observation)).max() > 0
    points = warped.paths([observation, observation], keys)
    assert points.shape == (4, 2, TINY.model.action_horizon, TINY.model.action_dim)
    np.testing.assert_allclose(points, policy.paths([observation, observation], keys), atol=1e-6)


@pytest.mark.parametrize(
    ("objective", "sampler"),
    [
        (Shortcut(), Euler(2)),
        (Gaussian(path=Cosine(), predicts="v"), DDIM(2, eta=1.0)),
        (Gaussian(path=Cosine(), predicts="noise"), DDIM(2)),
        (Tokens(bins=8), Greedy()),
    ],
)
def test_a_policy_of_any_objective_acts(tmp_path, observation, objective, sampler):
    decodes = isinstance(sampler, Greedy)
    model = TINY.model if decodes else dataclasses.replace(TINY.model, head=Compact(width=32, depth=2, time_width=16))
    changes = {"objective": objective, "model": model, "sampler": sampler, "normalization": "quantile"}
    config = dataclasses.replace(TINY, **changes)
    loaded = Policy.load(save_tiny_checkpoint(tmp_path, policy=config))
    chunk = loaded.infer(observation)
    assert chunk.shape == (TINY.model.action_horizon, 3)
    assert np.isfinite(chunk).all()
    assert (np.abs(chunk - loaded.infer(observation, seed=1)).max() > 0) == (not decodes)
    with pytest.raises(UserError, match="is sampled by"):
        Policy.load(tmp_path, sampler=Euler() if decodes else Greedy())


def test_action_tokens_need_quantile_normalisation_and_take_no_guidance():
    config = dataclasses.replace(TINY, objective=Tokens(bins=8), sampler=Greedy())
    with pytest.raises(UserError, match="takes quantile"):
        check_policy(config)
    with pytest.raises(UserError, match="guidance steers a flow"):
        check_policy(dataclasses.replace(config, normalization="quantile", guidance=Guidance()))
    with pytest.raises(UserError, match="not trained to go on"):
        check_policy(dataclasses.replace(TINY, real_time=RealTimeConfig("trained")))


def test_after_warm_up_nothing_is_compiled_whatever_comes(checkpoint_folder, policy, observation, caplog):
    warm = Policy.load(checkpoint_folder)
    with caplog.at_level(logging.INFO):
        seconds = warm.warm_up([1, 3], real_time=True)
    assert set(seconds) == {1, 3}
    assert min(seconds.values()) > 0
    assert "program 4 of 4 (batch of 3, prompt of 24 tokens, real time): compiled after" in caplog.text
    assert "batch of 3, prompt of 24 tokens, real time: runs in" in caplog.text
    before = warm.compiled
    assert before == 2 * 2  # batch sizes; with and without `previous`
    keys = jax.random.split(jax.random.key(0), 5)
    long = observation | {"prompt": "push the blue ball onto the yellow circle"}
    short = observation | {"prompt": "reach"}
    for count in range(1, 6):
        observations = [long, short, observation, short, long][:count]
        got = warm.infer_batch(observations, keys[:count])
        np.testing.assert_allclose(got, policy.infer_batch(observations, keys[:count]), atol=1e-5)
    warm.infer(observation | {"previous": np.zeros((2, 3), np.float32), "delay": 1})
    assert warm.compiled == before
    assert set(warm.latency()) == {"transform", "device", "postprocess", "total"}
    assert 0 < warm.latency()["total"]["p50"] <= warm.latency()["total"]["p95"] <= warm.latency()["total"]["p99"]
    with pytest.raises(ValueError, match="expected at least one"):
        warm.warm_up([])


def test_folded_parameters_change_no_action(checkpoint_folder, policy, observation):
    plain = Policy.load(checkpoint_folder, folded=False).infer(observation)
    np.testing.assert_allclose(policy.infer(observation), plain, atol=1e-5)


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("large", [1 << 12, 1 << 25])
def test_weights_stored_in_bfloat16_are_widened_when_loaded(tmp_path, monkeypatch, folded, large):
    monkeypatch.setattr("pi0_jax.inference.sampler._READ_AT_ONCE_BELOW", large)
    monkeypatch.setattr("pi0_jax.model.fold._JIT_ABOVE", large)
    stored = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), tiny_params(TINY))
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), stored)
    runs = [save_tiny_checkpoint(tmp_path / name, tree) for name, tree in (("stored", stored), ("wide", wide))]
    found, expected = (Policy.load(run, folded=folded).sampler.params for run in runs)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype("float32")}


def test_prompts_are_padded_to_the_shortest_length_that_holds_them(tmp_path, observation):
    model = dataclasses.replace(TINY.model, prompt_length=200)
    loaded = Policy.load(save_tiny_checkpoint(tmp_path, policy=dataclasses.replace(TINY, model=model)))
    assert [prompt_lengths(n) for n in (24, 48, 200)] == [(24,), (32, 48), (32, 64, 128, 200)]
    chunks = [loaded.infer(observation | {"prompt": "reach " * n}) for n in (1, 40)]
    assert loaded.compiled == 2
    whole = Policy.load(tmp_path, folded=False)
    for chunk, n in zip(chunks, (1, 40), strict=True):
        np.testing.assert_allclose(chunk, whole.infer(observation | {"prompt": "reach " * n}), atol=1e-5)


def test_noise_and_sampler_may_be_chosen(policy, observation):
    noise = np.random.default_rng(0).normal(size=(2, TINY.model.action_horizon, TINY.model.action_dim))
    chunk = policy.infer(observation, noise=noise[0])
    np.testing.assert_array_equal(chunk, policy.infer(observation, seed=1, noise=noise[0]))
    assert np.abs(chunk - policy.infer(observation, noise=noise[1])).max() > 0
    exact = policy.infer(observation, noise=noise[0], num_steps=64)
    heun = policy.infer(observation, noise=noise[0], sampler=Heun(8))
    euler = policy.infer(observation, noise=noise[0], num_steps=8)
    assert np.abs(heun - exact).max() < np.abs(euler - exact).max()
    with pytest.raises(ValueError, match="2 of noise"):
        policy.infer_batch([observation], jax.random.key(0)[None], noise=noise)


def test_eight_bits_say_what_they_change(checkpoint_folder, policy, observation, caplog):
    caplog.set_level("INFO")
    small = Policy.load(checkpoint_folder, bits="int8")
    assert "weights in int8: normalised actions change by" in caplog.text
    change = np.abs(small.infer(observation) - policy.infer(observation)).max()
    assert 0 < change < 0.01
    with pytest.raises(ValueError, match="folded parameters"):
        Policy.load(checkpoint_folder, folded=False, bits="int8")
