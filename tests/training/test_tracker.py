"""wandb and trackio get the numbers of TensorBoard, in one run however often it is resumed, from the first process."""

import sys
import types

import pytest

from pi0_jax.config import PolicyConfig, TrainConfig
from pi0_jax.errors import UserError
from pi0_jax.training import multihost
from pi0_jax.training.loop import _trackers
from pi0_jax.training.metrics import Reporter
from pi0_jax.training.run_dir import MAY_CHANGE, delete_run
from pi0_jax.training.tracker import FILE, Contained, open_service
from tests.training.test_metrics import events, metrics


class Recorded:
    """A run of a service: what it was opened with, its points, and whether it was finished."""

    def __init__(self, options: dict):
        self.options, self.points, self.finished = options, [], False

    def log(self, values, step=None):
        self.points.append((step, dict(values)))

    def finish(self):
        self.finished = True


@pytest.fixture(params=["wandb", "trackio"])
def service(request, monkeypatch) -> str:
    """A service whose package is a stand-in."""
    monkeypatch.delenv(f"{request.param.upper()}_PROJECT", raising=False)
    monkeypatch.setitem(sys.modules, request.param, types.SimpleNamespace(init=lambda **options: Recorded(options)))
    return request.param


def opened(service, folder, resumed=False):
    """The stand-in's run, and the tracker around it."""
    tracker = open_service(service, folder, {"seed": 0}, resumed=resumed)
    return tracker._tracker, tracker


def test_a_service_gets_the_points_of_tensorboard_and_the_end_of_the_run(service, tmp_path):
    run, tracker = opened(service, tmp_path)
    with Reporter(tmp_path, start=0, num_steps=4, batch_size=4, log_every=2, trackers=[tracker]) as report:
        for step in range(1, 5):
            report.push(step, metrics(step / 8))
        report.flush()
        report.write(4, {"validation_loss": 0.5})
        assert not run.finished
    assert run.finished
    assert [(step, values["loss"]) for step, values in run.points[:-1]] == [(2, 0.25), (4, 0.5)]
    assert run.points[-1] == (4, {"validation_loss": 0.5})
    drawn = {(e.step, value.tag) for e in events(tmp_path) for value in e.summary.value}
    assert drawn == {(step, name) for step, values in run.points for name in values}


def test_a_resumed_run_goes_on_in_the_same_one_and_a_new_run_does_not(service, tmp_path):
    first, _ = opened(service, tmp_path)
    again, _ = opened(service, tmp_path, resumed=True)
    assert again.options == first.options
    assert first.options["resume"] == "allow"
    assert first.options["config"] == {"seed": 0}
    assert first.options["project"] == "pi0_jax"
    assert first.options["name"].startswith(tmp_path.name)
    assert first.options.get("id") == (first.options["name"] if service == "wandb" else None)
    other, _ = opened(service, tmp_path)
    assert other.options["name"] != first.options["name"]
    delete_run(tmp_path)
    assert not (tmp_path / FILE).exists()
    assert "tracker" in MAY_CHANGE


def test_only_the_first_process_opens_a_service(service, tmp_path, monkeypatch):
    config = TrainConfig(policy=PolicyConfig(robot="tabletop"), tracker=service)
    (tracker,) = _trackers(config, tmp_path, resumed=False)
    assert tracker._tracker.options["config"]["tracker"] == service
    monkeypatch.setattr(multihost, "is_first", lambda: False)
    assert _trackers(config, tmp_path, resumed=False) == []


def test_the_project_is_the_services_own_variable(service, tmp_path, monkeypatch):
    monkeypatch.setenv(f"{service.upper()}_PROJECT", "arms")
    assert opened(service, tmp_path)[0].options["project"] == "arms"


def test_errors_of_a_service_end_the_tracking_and_not_the_training(tmp_path, caplog):
    class Broken(Recorded):
        def log(self, values, step=None):
            super().log(values, step)
            raise RuntimeError("no route to host")

    run = Broken({})
    tracker = Contained(run, "wandb")
    for step in (1, 2):
        tracker.log({"loss": 1.0}, step=step)
    tracker.finish()
    assert len(run.points) == 1
    assert caplog.text.count("wandb failed (no route to host)") == 1


def test_a_service_that_refuses_or_is_not_installed_is_named_with_the_way_out(service, tmp_path, monkeypatch):
    def refuse(**_):
        raise RuntimeError("not logged in")

    monkeypatch.setitem(sys.modules, service, types.SimpleNamespace(init=refuse))
    with pytest.raises(UserError, match=rf"--tracker {service}: not logged in\. "):
        open_service(service, tmp_path, {}, resumed=False)
    monkeypatch.setitem(sys.modules, service, None)
    with pytest.raises(UserError, match=rf"pip install -e '\.\[{service}\]'"):
        open_service(service, tmp_path, {}, resumed=False)
