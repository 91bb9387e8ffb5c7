"""The tabletop's ambiguous, precise and moving tasks: experts solve them, and what is meant to fail fails."""

from collections import Counter

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from pi0_jax.evaluate.record import Source, demonstrations
from pi0_jax.evaluate.simulators import find_simulator, get_simulator
from pi0_jax.evaluate.simulators.tabletop import insertion
from pi0_jax.evaluate.simulators.tabletop.chase import ChaseEnv
from pi0_jax.evaluate.simulators.tabletop.detour import TOUCH, DetourEnv
from pi0_jax.evaluate.simulators.tabletop.insertion import InsertionEnv
from pi0_jax.evaluate.simulators.tabletop.scene import POST_RADIUS
from pi0_jax.evaluate.simulators.tabletop.single import shortened
from pi0_jax.evaluate.simulators.tabletop.swerve import SwerveEnv
from pi0_jax.evaluate.simulators.tabletop.tasks import episode_seed

ENVS = (DetourEnv, InsertionEnv, ChaseEnv, SwerveEnv)


def run(env, index, act) -> dict:
    """The last `info` of an episode in which `act(env)` acts."""
    env.reset(seed=episode_seed("evaluation", index, seed=2024))
    while True:
        _, _, terminated, truncated, info = env.step(act(env))
        if terminated or truncated:
            return info


@pytest.mark.parametrize("make", ENVS, ids=lambda make: make.name)
def test_experts_succeed(make):
    env = make(lazy_images=True)
    assert sum(run(env, index, make.expert)["success"] for index in range(60)) >= 59


@pytest.mark.parametrize("make", ENVS, ids=lambda make: make.name)
def test_gymnasium_finds_no_fault(make):
    check_env(make(image_size=8), skip_render_check=True)


@pytest.mark.parametrize("make", ENVS, ids=lambda make: make.name)
def test_an_episode_depends_on_its_seed_and_actions_alone(make):
    def frames(env):
        actions = np.random.default_rng(0).uniform(-0.02, 0.02, (4, 3))
        seen = [env.reset(seed=11)[0], *(env.step(action)[0] for action in actions)]
        return [np.concatenate([*(image.ravel() for image in f["images"].values()), f["state"]]) for f in seen]

    used = make(image_size=16)
    run(used, 0, make.expert)
    np.testing.assert_array_equal(frames(used), frames(make(image_size=16)))


def test_the_expert_passes_on_either_side_whatever_the_layout():
    env = DetourEnv(lazy_images=True)
    modes = Counter(run(env, index, DetourEnv.expert)["mode"] for index in range(60))
    assert set(modes) == {"left", "right"}
    assert min(modes.values()) >= 15
    taken = []
    for side in (-1, 1):

        def act(env, side=side):
            env.drawn = side
            return env.expert()

        taken.append([run(env, index, act)["mode"] for index in range(10)])
    assert taken == [["right"] * 10, ["left"] * 10]


def test_the_mean_of_both_sides_does_not_get_past_the_pillar():
    def mean(env):
        actions = []
        for env.drawn in (-1, 1):
            actions.append(env.expert())
        return np.mean(actions, axis=0)

    env = DetourEnv(lazy_images=True)
    ends = [run(env, index, mean) for index in range(40)]
    assert sum(end["success"] for end in ends) <= 20


def test_touching_between_two_control_steps_counts():
    env = DetourEnv(lazy_images=True)
    env.reset(seed=0)
    for distance, touches in ((TOUCH + 0.004, False), (TOUCH - 0.005, True)):
        ends = [env.pillar + np.array([distance, y]) for y in (-0.04, 0.04)]
        assert np.linalg.norm(ends[1] - env.pillar) > TOUCH
        env._before, env._data.qpos[:2] = ends
        env._judge()
        assert env.failed == touches


@pytest.mark.parametrize(("offset", "fits"), [(0.0, True), (0.004, True), (0.012, False), (0.03, False)])
def test_the_ring_fits_within_millimetres_and_is_stuck_beyond(offset, fits):
    env = InsertionEnv(lazy_images=True)
    assert fits == (offset < insertion.PLAY + POST_RADIUS)
    for index in range(4):
        angle = index * np.pi / 2 + 0.3

        def aside(env, shift=offset * np.array([np.cos(angle), np.sin(angle)])):
            now = env._data.ctrl
            move = env.puck + shift - now[:2]
            arrived = np.linalg.norm(env.puck + shift - env._tool[:2]) < 1e-3
            return np.clip([*move, -0.04 if arrived else 0.0], -0.04, 0.04)

        end = run(env, index, aside)
        assert (end["success"], end["failed"]) == (fits, not fits)


def foresee(env, committed) -> list[np.ndarray]:
    """Eight actions by where the circle will be if it does not turn; the first ones are given."""
    command, chunk = env._data.ctrl[:2].copy(), []
    for number in range(8):
        move = env.target + (number + 1) * env.velocity - command
        action = committed[number] if number < len(committed) else np.array([*shortened(move), 0.0])
        command += action[:2]
        chunk.append(action)
    return chunk


def either_side(env, committed) -> list[np.ndarray]:
    """Eight actions of an expert who draws a side anew each time; the first ones are given."""
    ctrl, chunk = env._data.ctrl, []
    before = ctrl.copy()
    env.drawn = (-1, 1)[int(1e6 * before[:2].sum()) % 2]  # as good as at random
    for number in range(8):
        chunk.append(committed[number] if number < len(committed) else env.expert())
        ctrl[:] += chunk[-1]
    ctrl[:] = before
    return chunk


def delayed(env, index, way, delay, plan=foresee) -> bool:
    """Success of one who plans by what is seen and asks for a chunk every four steps, which is `delay` steps late."""
    chunk, asked, start, still = [], None, 0, np.zeros(3)

    def act(env):
        nonlocal chunk, asked, start
        now = env._steps
        left = chunk[now - start :]
        if asked is None and (not chunk or now - start >= (4 + delay if way == "waiting" else 4)):
            committed = [*left, *[still] * delay][:delay] if way == "continuing" else []
            asked = now, [still] * delay * (way == "waiting") + plan(env, committed)
        if asked is not None and (way == "waiting" or now >= asked[0] + delay):
            (start, chunk), asked = asked, None
        return chunk[now - start] if chunk and now - start < len(chunk) else still

    return run(env, index, act)["success"]


def test_delay_is_forgiven_only_where_chunks_continue_what_is_being_executed():
    env = ChaseEnv(lazy_images=True)
    for way, delay, low, high in (
        ("waiting", 0, 38, 40),
        ("waiting", 2, 0, 8),
        ("replacing", 2, 0, 8),
        ("continuing", 2, 22, 40),
    ):
        assert low <= sum(delayed(env, index, way, delay) for index in range(40)) <= high, way


def test_a_new_plan_amid_the_swerve_hits_the_pillar_and_a_continued_one_does_not():
    env = SwerveEnv(lazy_images=True)
    for way, low, high in (("waiting", 36, 40), ("replacing", 0, 28), ("continuing", 36, 40)):
        assert low <= sum(delayed(env, index, way, 2, either_side) for index in range(40)) <= high, way


def test_recordings_tell_the_mode_and_robots_find_the_old_simulator_first():
    found = list(demonstrations(Source("tabletop_detour"), 12, workers=1))
    assert {demonstration.mode for demonstration in found} == {"left", "right"}
    assert get_simulator("tabletop_detour").modes == ("left", "right")
    assert find_simulator("tabletop") == "tabletop"
