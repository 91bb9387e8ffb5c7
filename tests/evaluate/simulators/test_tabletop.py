"""The environment's contract, and the symmetry of what it draws."""

import os
import subprocess
import sys

import gymnasium
import mujoco
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import pi0_jax.evaluate.simulators.tabletop  # noqa: F401  (registers the environment)
from pi0_jax.evaluate.simulators.tabletop import scene
from pi0_jax.evaluate.simulators.tabletop.expert import expert_action
from pi0_jax.evaluate.simulators.tabletop.gantry import CAMERAS, MAX_STEPS
from pi0_jax.evaluate.simulators.tabletop.tabletop import TabletopEnv
from pi0_jax.evaluate.simulators.tabletop.tasks import OBJECTS, TASKS, episode_seed, find_task

QUARTER = np.array([[0, -1], [1, 0]])
MIRROR = np.diag([-1, 1])
SYMMETRIES = [(mirrored, turns) for mirrored in (False, True) for turns in range(4)]


def transform(mirrored: bool, turns: int) -> np.ndarray:
    return np.linalg.matrix_power(QUARTER, turns) @ (MIRROR if mirrored else np.eye(2))


def place(env: TabletopEnv, tool, objects, yaws, goal) -> None:
    """Puts everything where told. `tool` is x, y, z; the rest x, y, and an angle for each object."""
    data = env._data
    data.qpos[:3] = data.ctrl[:] = tool
    poses = data.qpos[3:].reshape(len(OBJECTS), 7)
    poses[:, :2] = objects
    poses[:, 3:] = np.stack([np.cos(yaws / 2), 0 * yaws, 0 * yaws, np.sin(yaws / 2)], -1)
    data.mocap_pos[0, :2] = goal
    mujoco.mj_forward(env._model, data)


@pytest.fixture(scope="module")
def env() -> TabletopEnv:
    return TabletopEnv()


def test_gymnasium_finds_no_fault():
    made = gymnasium.make("pi0_jax/Tabletop-v0", render_mode="rgb_array")
    check_env(made.unwrapped)
    made.reset(seed=0)
    assert made.render().shape == (256, 256, 3)


def test_observation_has_the_documented_contents(env):
    observation, info = env.reset(seed=5, options={"task": "push_blue_ball"})
    assert set(observation) == {"images", "state", "prompt"}
    assert list(observation["images"]) == list(CAMERAS)
    assert observation["prompt"] in find_task("push_blue_ball").prompts
    np.testing.assert_array_equal(observation["state"][:3], observation["state"][3:])
    assert (info["task"], info["success"]) == ("push_blue_ball", False)
    assert list(info["successes"]) == [task.name for task in TASKS]


def test_an_episode_depends_on_its_seed_and_actions_alone():
    def run(env):
        actions = np.random.default_rng(0).uniform(-0.04, 0.04, (6, 3))
        frames = [env.reset(seed=11)[0], *(env.step(action)[0] for action in actions)]
        return [(f["images"]["top"], f["images"]["tool"], f["state"], f["prompt"]) for f in frames]

    used = TabletopEnv()
    used.reset(seed=3)
    used.step(np.array([0.04, 0.04, -0.04]))
    for a, b in zip(run(used), run(TabletopEnv()), strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)


def test_the_layout_of_a_seed_is_the_same_for_every_task(env):
    layouts = []
    for task in TASKS:
        env.reset(seed=7, options={"task": task})
        layouts.append(np.concatenate([env._data.qpos, env.snapshot().goal]))
    assert np.ptp(layouts, axis=0).max() == 0


def test_layouts_keep_their_distances_and_no_task_starts_done():
    env = TabletopEnv(lazy_images=True)
    for index in range(100):
        _, info = env.reset(seed=episode_seed("validation", index))
        now = env.snapshot()
        points = np.stack([*now.objects.values(), now.goal])
        gaps = np.linalg.norm(points[:, None] - points, axis=-1) + np.eye(4)
        assert gaps.min() >= scene.MIN_GAP - 1e-9
        assert np.abs(points).max() <= scene.HALF_SPREAD
        assert not any(info["successes"].values())


def test_actions_move_the_command_and_are_clipped(env):
    before = env.reset(seed=0)[0]["state"]
    after = env.step(np.array([1.0, -0.01, 0.0]))[0]["state"]
    np.testing.assert_allclose(after[3:] - before[3:], [0.04, -0.01, 0.0], atol=1e-6)
    np.testing.assert_allclose(after[:3], after[3:], atol=2e-3)  # the ring keeps up


def test_commands_stay_inside_the_workspace(env):
    env.reset(seed=0)
    for _ in range(15):
        state = env.step(np.array([0.04, 0.04, 0.04]))[0]["state"]
    np.testing.assert_allclose(state[3:], scene.COMMAND_HIGH, atol=1e-6)


@pytest.mark.parametrize("action", [np.zeros(4), np.zeros((8, 3)), np.array([0, np.nan, 0])])
def test_what_is_no_action_is_refused(env, action):
    env.reset(seed=0)
    with pytest.raises(ValueError, match="three finite numbers"):
        env.step(action)


def test_episodes_are_cut_after_forty_steps():
    env = TabletopEnv(lazy_images=True)
    env.reset(seed=0)
    ends = [env.step(np.zeros(3))[2:4] for _ in range(MAX_STEPS)]
    assert ends == [(False, False)] * (MAX_STEPS - 1) + [(False, True)]


def test_one_task_can_be_scored_while_another_is_instructed():
    env = TabletopEnv(lazy_images=True)
    scored, instructed = TASKS[0], TASKS[2]
    observation, info = env.reset(seed=0, options={"task": scored, "prompt": instructed.prompts[0]})
    assert observation["prompt"] == instructed.prompts[0]
    for _ in range(10):
        _, reward, terminated, _, info = env.step(expert_action(instructed, env.snapshot()))
        if info["successes"][instructed.name]:
            break
    assert info["successes"][instructed.name]
    assert (reward, terminated, info["success"], info["successes"][scored.name]) == (0.0, False, False, False)


@pytest.mark.parametrize("options", [{"tsak": TASKS[0]}, {"task": "juggle"}, {"prompt": ""}, {"prompt": "x" * 300}])
def test_bad_options_are_refused(env, options):
    with pytest.raises(ValueError, match=r"knows|named|expected"):
        env.reset(seed=0, options=options)


def test_lazy_images_are_those_of_the_eager_environment():
    eager, lazy = TabletopEnv(), TabletopEnv(lazy_images=True)
    expected, got = eager.reset(seed=2)[0], lazy.reset(seed=2)[0]
    assert "images" not in got
    assert got in lazy.observation_space
    for action in np.random.default_rng(1).uniform(-0.04, 0.04, (4, 3)):
        expected = eager.step(action)[0]
        assert "images" not in lazy.step(action)[0]
    for camera in CAMERAS:
        np.testing.assert_array_equal(lazy.observe()["images"][camera], expected["images"][camera])


@pytest.mark.parametrize(("mirrored", "turns"), SYMMETRIES)
@pytest.mark.parametrize("camera", CAMERAS)
def test_turning_and_mirroring_the_scene_does_so_to_the_image(env, camera, mirrored, turns):
    rng = np.random.default_rng(4)
    matrix = transform(mirrored, turns)
    for seed in range(5):
        env.reset(seed=seed)
        now = env.snapshot()
        objects, yaws = np.stack(list(now.objects.values())), rng.uniform(-3, 3, len(OBJECTS))
        tool = now.tool - [0, 0, 0.06 * rng.random()]
        place(env, tool, objects, yaws, now.goal)
        image = env.observe()["images"][camera]
        yaws = (-yaws if mirrored else yaws) + turns * np.pi / 2
        place(env, [*(matrix @ tool[:2]), tool[2]], objects @ matrix.T, yaws, matrix @ now.goal)
        expected = np.rot90(image[:, ::-1] if mirrored else image, turns)
        different = np.abs(env.observe()["images"][camera].astype(int) - expected).max(-1) > 2
        assert different.mean() < 0.002  # a ray that grazes an edge may fall to either side


@pytest.mark.parametrize(("mirrored", "turns"), SYMMETRIES)
def test_turning_and_mirroring_the_scene_does_so_to_what_the_expert_does_and_causes(mirrored, turns):
    matrix, env = transform(mirrored, turns), TabletopEnv(lazy_images=True)
    turned, errors = TabletopEnv(lazy_images=True), []
    for seed, task in enumerate(TASKS):
        for each in (env, turned):
            each.reset(seed=seed, options={"task": task})
        now = env.snapshot()
        objects = np.stack(list(now.objects.values()))
        place(env, now.tool, objects, np.zeros(3), now.goal)
        place(turned, [*(matrix @ now.tool[:2]), now.tool[2]], objects @ matrix.T, np.zeros(3), matrix @ now.goal)
        terminated = False
        while not terminated:
            action, image = (expert_action(task, each.snapshot()) for each in (env, turned))
            np.testing.assert_allclose([*(matrix @ action[:2]), action[2]], image, atol=5e-3)
            terminated = env.step(action)[2]
            turned.step(image)
        after, image = (np.stack(list(each.snapshot().objects.values())) for each in (env, turned))
        errors.append(np.abs(after @ matrix.T - image).max())
    assert np.median(errors) < 1e-3  # contacts amplify rounding, so single episodes part by millimetres


def pixels_of(image, color):
    """Rows and columns of the pixels of a colour, in light or shade: (1, 1, 0) is yellow."""
    brightest = image.max(-1, keepdims=True).astype(int)
    return np.nonzero(((image > brightest / 2) == np.array(color, bool)).all(-1) & (brightest[..., 0] > 60))


RED, GREEN, BLUE, YELLOW = (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0)


@pytest.mark.parametrize("camera", CAMERAS)
def test_images_have_x_to_the_right_y_up_and_every_object_in_its_colour(env, camera):
    objects, goal = np.array([[0.1, 0.0], [0.0, 0.1], [-0.1, 0.0]]), np.array([0.0, -0.12])
    place(env, [0, 0, 0.1], objects, np.zeros(3), goal)
    image = env.observe()["images"][camera]
    middle = (len(image) - 1) / 2
    for position, color in zip([*objects, goal], [RED, GREEN, BLUE, YELLOW], strict=True):
        rows, columns = pixels_of(image, color)
        found = np.array([columns.mean() - middle, middle - rows.mean()])
        assert len(rows) >= 16
        assert found @ position / (np.linalg.norm(found) * np.linalg.norm(position)) > 0.98


@pytest.mark.parametrize("camera", CAMERAS)
@pytest.mark.parametrize("height", [0.01, 0.05, 0.1])
def test_the_ring_never_hides_the_object_it_is_over(env, camera, height):
    others = np.array([[0.17, -0.17], [-0.17, -0.17]])
    for at in ([0, 0], [0.17, 0.17], [-0.17, 0.1]):
        for i, color in enumerate((RED, GREEN, BLUE)):
            place(env, [*at, height], np.insert(others, i, at, axis=0), np.zeros(3), [0.0, 0.17])
            assert len(pixels_of(env.observe()["images"][camera], color)[0]) >= 16


def test_images_are_centred_on_mid_grey(env):
    images = [image for seed in range(10) for image in env.reset(seed=seed)[0]["images"].values()]
    assert np.abs(np.mean(images, axis=(0, 1, 2)) / 127.5 - 1).max() < 0.1


def test_drawing_needs_no_gl():
    code = (
        "import sys; from pi0_jax.evaluate.simulators.tabletop.tabletop import TabletopEnv;"
        "env = TabletopEnv(); env.reset(seed=0);"
        "env.draw_view(size=32); print([m for m in sys.modules if m.split('.')[0] == 'OpenGL'], 'jax' in sys.modules)"
    )
    bare = {name: value for name, value in os.environ.items() if name not in ("MUJOCO_GL", "DISPLAY")}
    assert subprocess.check_output([sys.executable, "-c", code], text=True, env=bare).strip() == "[] False"
