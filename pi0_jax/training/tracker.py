"""Trackers, which draw the numbers of a run: TensorBoard's event files, and Weights & Biases or trackio.

The name of a run at a tracking service is kept in its folder, so that a run that is resumed goes on there as one curve.
"""

from __future__ import annotations

import logging
import os
import re
import uuid
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from tensorboardX import SummaryWriter

from pi0_jax.errors import UserError, require_package

FILE = "tracker.txt"
"""In the run's folder: the run's name at the service."""
Service = Literal["wandb", "trackio"]
_ADVICE = {
    "wandb": "Log in with `wandb login`, or keep the numbers on this machine with WANDB_MODE=offline.",
    "trackio": "`pip install -U trackio` updates it; without --tracker the numbers are in TensorBoard's files alone.",
}
_log = logging.getLogger(__name__)


@runtime_checkable
class Tracker(Protocol):
    """Takes the numbers of one run. Runs of wandb and trackio are trackers as they are."""

    def log(self, values: dict[str, float], step: int) -> Any:
        """Adds the numbers of a step."""
        ...

    def finish(self) -> Any:
        """Writes what is left to write."""
        ...


class TensorBoard:
    """Event files in the run's folder."""

    def __init__(self, run_dir: Path, start: int):
        """Opens a new event file. TensorBoard drops the points after `start`, of a run that was killed."""
        self._events = SummaryWriter(str(run_dir), purge_step=start + 1 if start else None, flush_secs=10)

    def log(self, values: dict[str, float], step: int):
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def finish(self):
        self._events.close()


class Contained:
    """A service whose errors end the tracking, and never the training."""

    def __init__(self, tracker: Tracker, service: Service):
        self._tracker: Tracker | None = tracker
        self._service = service

    def log(self, values: dict[str, float], step: int):
        if self._tracker is None:
            return
        try:
            self._tracker.log(values, step=step)
        except Exception as error:
            _log.warning("step %d: %s failed (%s); the run goes on without it", step, self._service, error)
            self._tracker = None

    def finish(self):
        try:
            if self._tracker is not None:
                self._tracker.finish()
        except Exception as error:
            _log.warning("%s could not finish (%s); metrics.jsonl is complete", self._service, error)


def package(service: Service) -> Any:
    """The package of a tracking service; UserError where it is not installed."""
    if service == "wandb":
        return require_package("wandb", "wandb", "--tracker wandb")
    return require_package("trackio", "trackio", "--tracker trackio")


def open_service(service: Service, run_dir: Path, config: dict[str, Any], *, resumed: bool) -> Tracker:
    """Opens a run at a tracking service: the same one as before where a run is resumed, else a new one.

    The project is `pi0_jax`, or what WANDB_PROJECT or TRACKIO_PROJECT says.

    Args:
        service: which one.
        run_dir: the run's folder, which keeps the name of the run there.
        config: the experiment, as a JSON object.
        resumed: whether the run goes on from a checkpoint.

    Raises:
        UserError: the package is not installed, or refuses to open a run.
    """
    module, name = package(service), _name(run_dir, resumed)
    project = os.environ.get(f"{service.upper()}_PROJECT") or "pi0_jax"
    identity = {"id": name, "dir": str(run_dir)} if service == "wandb" else {}  # trackio knows a run by its name
    try:
        run = module.init(project=project, name=name, config=config, resume="allow", **identity)
    except Exception as error:
        raise UserError(f"--tracker {service}: {error}. {_ADVICE[service]}") from error
    _log.info("tracker: %s, project %s, run %s", service, project, name)
    return Contained(run, service)


def _name(run_dir: Path, resumed: bool) -> str:
    file = run_dir / FILE
    if resumed and file.is_file():
        return file.read_text().strip()
    folder = re.sub(r"[^\w.-]", "-", run_dir.resolve().name)
    name = f"{folder}-{uuid.uuid4().hex[:8]}"
    file.write_text(name + "\n")
    return name
