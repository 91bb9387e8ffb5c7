"""Tasks in processes, and on a Ray cluster of one machine: order, retries, and no more results than are asked for."""

import errno
from pathlib import Path

import pytest

from pi0_jax.data import pool
from pi0_jax.data.pool import run_tasks
from pi0_jax.data.tools.stats import compute_normalizations
from pi0_jax.errors import UserError
from tests.data.test_loader import opened


def touch(folder: Path, number: int) -> int:
    (folder / str(number)).touch()
    return number


def test_results_come_in_order_and_few_are_kept(tmp_path):
    results = run_tasks(touch, [(tmp_path, number) for number in range(40)], 2)
    assert next(results) == 0
    assert len(list(tmp_path.iterdir())) <= 2 * pool.AHEAD
    assert list(results) == list(range(1, 40))


class Failing:
    """Fails as storage does, some times."""

    def __init__(self, times, number):
        self.times, self.number, self.calls = times, number, 0

    def __call__(self, _):
        self.calls += 1
        if self.calls <= self.times:
            try:
                raise OSError(self.number, "no answer")
            except OSError as error:
                raise UserError("the file cannot be read") from error
        return "read"


@pytest.mark.parametrize(("times", "number", "calls"), [(2, errno.EIO, 3), (3, errno.EIO, 3), (1, errno.ENOSPC, 1)])
def test_storage_that_fails_is_asked_again_and_other_errors_are_raised(monkeypatch, times, number, calls):
    monkeypatch.setattr(pool, "WAIT", 0.0)
    function = Failing(times, number)
    if times < calls:
        assert list(run_tasks(function, [(0,)])) == ["read"]
    else:
        with pytest.raises(UserError, match="cannot be read"):
            list(run_tasks(function, [(0,)]))
    assert function.calls == calls


def fail(dataset, number: int) -> int:
    raise UserError(f"episode {number} of {dataset}")


def test_ray_gives_the_same_statistics_and_errors(dataset, monkeypatch):
    pytest.importorskip("ray.data", reason="Ray Data is not installed: pip install -e '.[ray]'")
    monkeypatch.setattr("pi0_jax.data.tools.stats.FRAMES_PER_TASK", 10)
    here, there = (compute_normalizations([opened(dataset)], 4, ray=ray)["tabletop"].stats for ray in (False, True))
    for key in ("state", "actions"):
        for a, b in zip(here[key], there[key], strict=True):
            assert (a == b).all()
    with pytest.raises(UserError, match="episode 3 of mine"):
        list(run_tasks(fail, [("mine", 3)], ray=True))
