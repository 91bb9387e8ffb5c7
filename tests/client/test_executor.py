"""The executor with a policy, a clock and a thread that are the test's own; and once with real threads."""

import concurrent.futures
import threading

import numpy as np
import pytest

from pi0_client.executor import Executor, Stopped
from pi0_client.player import Delays, open_loop, real_time, receding_horizon

OBSERVATION = {"state": np.zeros(1)}


class Pool(concurrent.futures.Executor):
    """Runs what was submitted when the test says so."""

    def __init__(self):
        self.jobs = []

    def submit(self, fn, /, *args, **kwargs):
        future = concurrent.futures.Future()
        self.jobs.append((future, fn, args))
        return future

    def finish(self):
        future, fn, args = self.jobs.pop()
        try:
            future.set_result(fn(*args))
        except Exception as error:
            future.set_exception(error)


class Bench:
    """An executor whose policy answers with the state it saw plus 0, 1, …, and takes what time the test says."""

    def __init__(self, strategy, horizon=6, **options):
        self.pool, self.sent, self.queried, self.now = Pool(), [], [], 0.0
        self.answer = lambda seen: seen["state"] + np.arange(horizon)[:, None]
        self.executor = Executor(
            self.infer,
            lambda action: self.sent.append(float(action[0])),
            strategy,
            pool=self.pool,
            clock=lambda: self.now,
            **options,
        )
        self.steps = 0

    def infer(self, observation):
        self.queried.append(observation)
        self.now += 0.25
        return self.answer(observation)

    def step(self, finish=False):
        """One control step; with `finish`, the answer comes before the next one."""
        self.executor.step({"state": np.full(1, float(self.steps))})
        self.steps += 1
        if finish and self.pool.jobs:
            self.pool.finish()

    def steps_all(self, count):
        for _ in range(count):
            self.step(finish=True)


def test_nothing_is_sent_before_the_first_chunk_then_one_action_per_step():
    bench = Bench(open_loop(6))
    bench.step()
    bench.step(finish=True)
    assert bench.sent == []
    for _ in range(4):
        bench.step()
    assert bench.sent == [0, 1, 2, 3]
    assert bench.executor.stats.starved == 2


def test_delays_are_measured_and_sent_to_the_policy():
    bench = Bench(real_time(2), delays=Delays(initial=0))
    for finish in (False, False, True) + (False, True) * 4:
        bench.step(finish=finish)
    stats = bench.executor.stats
    assert list(stats.delays)[:3] == [3, 2, 2]
    assert set(stats.seconds) == {0.25}
    assert stats.chunks == len(stats.delays)
    first, second, *_ = bench.queried
    assert "previous" not in first
    assert second["delay"] == 3
    # The robot stood still until the first chunk was there, so two of its six actions were executed since.
    np.testing.assert_array_equal(second["previous"][:, 0], [2, 3, 4, 5])


def test_an_answer_may_be_a_servers():
    bench = Bench(open_loop(6))
    bench.answer = lambda seen: {"actions": np.full((6, 1), 7.0), "policy_timing": {}}
    bench.step(finish=True)
    bench.step()
    assert bench.sent == [7]


def test_starved_it_holds_and_recovers():
    bench = Bench(receding_horizon(2, waits=False), horizon=3, hold=lambda last: 0 * last)
    for finish in (True, False, False, False, False, False, True, False):
        bench.step(finish=finish)
    assert bench.sent == [0, 1, 2, 0, 0, 0, 4]  # queried at 3 with the third action still to come


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (np.full((3, 1), np.nan), "NaN"),
        (np.zeros(3), r"shape \(3,\)"),
        (np.zeros((0, 1)), r"\(0, 1\)"),
        (np.zeros((3, 2)), r"expected \(steps, 1\)"),
    ],
)
def test_bad_chunks_are_never_executed_and_consecutive_ones_stop_it(answer, reason):
    bench = Bench(receding_horizon(2, waits=False), max_failures=2)
    for _ in range(3):
        bench.step(finish=True)
    good, bench.answer = bench.answer, lambda seen: answer
    sent = len(bench.sent)
    bench.step(finish=True)
    bench.answer = good
    for _ in range(3):
        bench.step(finish=True)
    assert bench.executor.stats.failures == 1
    assert len(bench.sent) == sent + 4
    assert np.isfinite(bench.sent).all()
    bench.answer = lambda seen: answer
    with pytest.raises(Stopped, match=f"2 consecutive queries failed, the last with: .*{reason}"):
        bench.steps_all(20)
    with pytest.raises(Stopped, match="make another one"):
        bench.step()


def test_warming_up_queries_with_and_without_previous_unmeasured():
    bench = Bench(real_time(2))
    bench.executor.warm_up(OBSERVATION)
    assert [sorted(seen) for seen in bench.queried] == [["state"], ["delay", "previous", "state"]]
    assert len(bench.queried[1]["previous"]) == 4
    assert bench.executor.stats.chunks == 0
    Bench(open_loop(6)).executor.warm_up(OBSERVATION)


def test_after_stop_no_action_is_sent():
    """Several times, in real threads: the stopping thread looks at what was sent right after `stop` returned."""
    for _ in range(20):
        sent, started = [], threading.Event()

        def send(action, sent=sent, started=started):
            sent.append(action)
            if len(sent) == 3:
                started.set()

        executor = Executor(lambda seen: np.zeros((4, 1)), send, receding_horizon(2, waits=False))
        ended = []

        def control(executor=executor, ended=ended):
            try:
                while True:
                    executor.step(OBSERVATION)
            except Stopped as error:
                ended.append(error)

        thread = threading.Thread(target=control)
        thread.start()
        assert started.wait(10)
        executor.stop()
        count = len(sent)
        thread.join(10)
        assert not thread.is_alive()
        assert len(sent) == count
        assert ended


def test_stop_may_come_from_within_send_as_a_signal_handler_would():
    executor = Executor(
        lambda seen: np.zeros((4, 1)), lambda action: executor.stop(), open_loop(4), pool=(pool := Pool())
    )
    executor.step(OBSERVATION)
    pool.finish()
    executor.step(OBSERVATION)
    with pytest.raises(Stopped):
        executor.step(OBSERVATION)
    executor.stop()


def test_stop_does_not_wait_for_a_policy_that_computes():
    release, begun = threading.Event(), threading.Event()

    def slow(seen):
        begun.set()
        assert release.wait(10)
        return np.zeros((4, 1))

    sent = []
    with Executor(slow, sent.append, open_loop(4)) as executor:
        executor.step(OBSERVATION)
        assert begun.wait(10)
    release.set()
    assert sent == []
    with pytest.raises(Stopped):
        executor.step(OBSERVATION)
