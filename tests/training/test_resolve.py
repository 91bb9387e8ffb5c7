"""What a configuration decides by itself."""

import dataclasses

import jax

from pi0_jax.config import Autoregressive, DataConfig, DatasetConfig, PolicyConfig, Reflow, TrainConfig
from pi0_jax.sampler import Greedy
from pi0_jax.training.resolve import resolve, wide_enough
from tests.conftest import tiny_config


def test_cameras_that_no_robot_has_stay_where_they_are_seen_black():
    for blank in (False, True):
        policy = PolicyConfig(
            robot="tabletop",
            model=tiny_config("pi0_fast", cameras=("top", "wrist"), vocab_size=200),
            objective=Autoregressive(blank_cameras=blank),
            sampler=Greedy(),
            normalization="quantile",
        )
        run = resolve(TrainConfig(policy=policy, batch_size=2), jax.devices()[:1])
        present, absent = (("top", "wrist"), ()) if blank else (("top",), ("wrist",))
        assert (run.cameras.present, run.cameras.absent) == (present, absent)
        assert run.policy.model.cameras == present


def test_a_model_of_random_weights_becomes_as_wide_as_its_widest_robot(caplog):
    caplog.set_level("INFO")
    policy = PolicyConfig(robot="tabletop", model=tiny_config("pi0", action_dim=8))
    fits = TrainConfig(policy=policy)
    assert wide_enough(fits) == fits
    assert not caplog.text
    wide = dataclasses.replace(fits, data=DataConfig(datasets=(DatasetConfig("x", robot="aloha"), DatasetConfig("y"))))
    assert wide_enough(wide).policy.model == dataclasses.replace(policy.model, action_dim=14)
    assert "14 dimensions" in caplog.text
    for trained in (
        dataclasses.replace(wide, init_from="weights"),
        dataclasses.replace(wide, policy=dataclasses.replace(policy, objective=Reflow(teacher="run"))),
    ):
        assert wide_enough(trained) == trained
