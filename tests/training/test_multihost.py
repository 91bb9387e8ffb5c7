"""Two processes train what one trains, stop together, and never wait for one that is gone."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pi0_jax.checkpoint import steps
from pi0_jax.config import HostsConfig, MeshConfig
from pi0_jax.training import multihost, sharding
from tests.data.conftest import write

ROOT = Path(__file__).parents[2]
STEPS, SAVED = 12, 8
HEARTBEAT = 10
PATIENT = ("--hosts.heartbeat-timeout", "100")
"""For processes that are not to fail while several of them compile at once."""

CONFIG = """
from pi0_jax.config import *
from tests.conftest import tiny_config
model = tiny_config("pi0", cameras=("top",), depth=1, action_dim=8, vocab_size=512, prompt_length=16, num_kv_heads=2)
config = TrainConfig(
    policy=PolicyConfig(robot="tabletop", model=model, objective=Gaussian(draws=2)),
    optim=OptimConfig(name="adamw", peak_lr=1e-3, warmup_steps=2, decay_steps={steps}, ema_decay=0.9),
    data=DataConfig({data!r}, {data!r}),
    hosts=HostsConfig(start_timeout=60, heartbeat_timeout={heartbeat}),
    batch_size=8, num_steps={steps}, log_every=5, validate_every={steps}, save_every={saved}, keep_checkpoints=5,
)
"""
PROGRAM = """
import os, signal, sys
from pathlib import Path
import numpy as np
import pytest
from pi0_jax.cli import main
from pi0_jax.training import loop
from pi0_jax.training.partition import flat
from tests.conftest import random_weights
from tests.training.test_loop import at_step
step, action, own, *args = sys.argv[1:]
own_weights = loop.first_weights

def first_weights(run, shapes):
    # NumPy's, which compile nothing. `own`: a file that the network's own are written to, or compared with.
    if own:
        weights = flat(own_weights(run, shapes))
        if not Path(own).is_file():
            np.savez(own, **weights)
        with np.load(own) as alone:
            for name, x in weights.items():
                for shard in x.addressable_shards:
                    np.testing.assert_array_equal(shard.data, alone[name][shard.index], name)
    return random_weights(run, shapes)

def act():
    if action == "fail":
        raise OSError("the disk of this host is gone")
    os.kill(os.getpid(), getattr(signal, action))

loop.first_weights = first_weights
if action:
    at_step(pytest.MonkeyPatch(), int(step), act)
sys.exit(main(args))
"""
STEPS_ALONE = """
import os, signal, sys, time
from pi0_jax.config import HostsConfig, MeshConfig
from pi0_jax.training import multihost, sharding
step, action, *address = sys.argv[1:]
multihost.connect(HostsConfig(address[1], int(address[3]), int(address[5]), heartbeat_timeout={heartbeat}))
vote = multihost.StopVote(sharding.make_mesh(MeshConfig()))
with multihost.ended_together((), "Continue with --resume."):
    for number in range(10_000):
        vote(None)
        time.sleep(0.05)
        if action and number == int(step):
            if action == "fail":
                raise OSError("the disk of this host is gone")
            os.kill(os.getpid(), getattr(signal, action))
"""
"""Nothing but the votes of a run."""


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hosts")
    path = folder / "config.py"
    path.write_text(CONFIG.format(data=str(write(folder / "data")), steps=STEPS, saved=SAVED, heartbeat=HEARTBEAT))
    return path


def start(
    config: Path | None,
    run_dir: Path | None,
    *flags: str,
    devices: int = 1,
    at: int = 0,
    action: str = "",
    weights: Path | str = "",
) -> subprocess.Popen:
    """`pi0 train` (without a config: votes alone) in a process of its own, which sends itself a signal, or fails, in
    step `at`, and writes the network's own initial weights to the file `weights`, or compares its own with it."""
    shared = re.sub("--xla_force_host_platform_device_count=[0-9]+", "", os.environ["XLA_FLAGS"])
    environment = os.environ | {
        "XLA_FLAGS": f"{shared} --xla_force_host_platform_device_count={devices}",
    }
    program, own = PROGRAM, (str(weights), "train", str(config), "--run-dir", str(run_dir))
    if config is None:
        program, own = STEPS_ALONE.format(heartbeat=HEARTBEAT), ()
    return subprocess.Popen(
        [sys.executable, "-c", program, str(at), action, *own, *flags],
        env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def together(
    config: Path | None, run_dir: Path | None, *flags: str, count: int = 2, actor: int = 1, **options
) -> tuple[list[int], list[str], float]:
    """Processes of `start`, of which `actor` does what `options` say: exit codes, stderr, and seconds from the end of
    the actor to that of the last."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for index in range(count):
        own = options if index == actor else {k: v for k, v in options.items() if k in ("devices", "weights")}
        joined = ("--hosts.coordinator", f"127.0.0.1:{port}", "--hosts.count", str(count), "--hosts.index", str(index))
        processes.append(start(config, run_dir, *joined, *flags, **own))
    try:
        texts = [""] * count
        if options.get("action") != "SIGSTOP":
            texts[actor] = processes[actor].communicate(timeout=200)[1]
        then = time.monotonic()
        for index in set(range(count)) - {actor}:
            texts[index] = processes[index].communicate(timeout=100)[1]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], texts, time.monotonic() - then


def done(process: subprocess.Popen) -> str:
    error = process.communicate(timeout=200)[1]
    assert process.returncode == 0, error
    return error


def losses(run_dir: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    found = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    assert [step for step, _ in found] == list(range(1, len(found) + 1))
    return dict(found)


def assert_same_losses(run_dir: Path, reference: dict[int, float], steps: int):
    found = losses(run_dir)
    assert len(found) == steps
    found, expected = [found[i] for i in found], [reference[i] for i in found]
    print(f"losses differ by at most {np.abs(np.subtract(found, expected)).max():.1e}")
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.fixture(scope="module")
def reference(config) -> dict[int, float]:
    """Losses of one process with one device."""
    run_dir = config.parent / "reference"
    done(start(config, run_dir, weights=config.parent / "weights.npz"))
    return losses(run_dir)


def test_two_processes_of_four_devices_stop_at_one_step_and_their_checkpoint_gives_the_losses_of_one_device_anywhere(
    config, reference, tmp_path
):
    run_dir = tmp_path / "eight"
    preset = ("--sharding", str(ROOT / "configs" / "sharding" / "multi_slice.py"))
    weights = config.parent / "weights.npz"
    how = {"devices": 4, "at": SAVED + 1, "action": "SIGTERM", "weights": weights}
    codes, texts, _ = together(config, run_dir, *preset, *PATIENT, **how)
    assert codes == [0, 0], texts
    assert "8 x cpu of 2 processes, mesh data 2 x fsdp 4" in texts[0]
    assert "step 5 of" not in texts[1]  # the first process alone says what both do
    stopped = [re.search(r"stopped at step (\d+)\. Last checkpoint: .*/(\d+)\.", text) for text in texts]
    assert stopped[0] is not None
    assert stopped[1] is not None
    assert stopped[0].groups() == stopped[1].groups()
    assert SAVED + 1 <= int(stopped[0][1]) <= SAVED + 3
    assert_same_losses(run_dir, reference, int(stopped[0][1]))
    command = re.search(r"Continue with: pi0 train (.*)", texts[0])
    assert command is not None
    assert "--hosts.index 0 " in command[1]
    assert command[1].endswith("--resume")
    for devices in (1, 8):
        copy = tmp_path / str(devices)
        shutil.copytree(run_dir, copy)
        flags = ("--resume", "--sharding", str(ROOT / "configs" / "sharding" / "fsdp.py"))
        assert f"devices: {devices} x cpu of 1" in done(start(config, copy, *flags, devices=devices))
        assert_same_losses(copy, reference, STEPS)


def test_four_processes_of_two_devices_give_the_losses_of_one_device(config, reference, tmp_path):
    preset = ("--sharding", str(ROOT / "configs" / "sharding" / "fsdp_tensor.py"))
    few = ("--num-steps", "4", "--data.validation-path", "None")  # the other tests validate
    codes, texts, _ = together(config, tmp_path / "run", *preset, *few, *PATIENT, count=4, devices=2)
    assert codes == [0, 0, 0, 0], texts
    assert "8 x cpu of 4 processes, mesh data 1 x fsdp 4 x tensor 2" in texts[0]
    assert_same_losses(tmp_path / "run", reference, 4)


def assert_ended(codes: list[int], texts: list[str], seconds: float, actor: int):
    assert codes[1 - actor] not in (0, None), texts
    assert seconds < HEARTBEAT + 15
    assert "Continue with --resume" in texts[1 - actor]


def test_when_one_process_is_killed_the_other_one_ends_in_bounded_time_and_one_alone_goes_on(
    config, reference, tmp_path
):
    every = ("--save-every", "4")
    assert_ended(*together(config, tmp_path / "run", *every, at=10, action="SIGKILL"), actor=1)
    assert steps(tmp_path / "run")[0] == 4
    done(start(config, tmp_path / "run", *every, "--resume"))
    assert_same_losses(tmp_path / "run", reference, STEPS)


@pytest.mark.parametrize(("actor", "action"), [(0, "SIGKILL"), (1, "SIGSTOP"), (1, "fail")])
def test_whatever_becomes_of_a_process_the_other_one_ends_with_advice_in_bounded_time(actor, action):
    codes, texts, seconds = together(None, None, actor=actor, at=4, action=action)
    assert_ended(codes, texts, seconds, actor)
    if action == "fail":
        assert codes[1] == 1
        assert "process 1 of 2: the disk of this host is gone" in texts[1]


def test_half_an_address_is_refused_with_what_is_missing(monkeypatch):
    monkeypatch.delenv("JAX_NUM_PROCESSES", raising=False)
    with pytest.raises(ValueError, match=r"process None of 2.*--hosts\.index"):
        multihost.connect(HostsConfig(coordinator="localhost:1", count=2))
    with pytest.raises(ValueError, match=r"process 2 of 2"):
        multihost.connect(HostsConfig(coordinator="localhost:1", count=2, index=2))
    with pytest.raises(ValueError, match=r"--hosts\.coordinator"):
        multihost.connect(HostsConfig(count=2, index=0))


def test_a_process_whose_partners_never_come_says_so():
    program = (
        "from pi0_jax.training.multihost import connect, HostsConfig\n"
        "connect(HostsConfig('127.0.0.1:{port}', 2, {index}, start_timeout=2))"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for index in (0, 1):
        text = program.format(port=port, index=index)
        run = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=60)
        assert run.returncode, index
        assert "did not find one another in 2 s (--hosts.start-timeout)" in run.stderr, run.stderr[-2000:]


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "8"}, False),  # in a batch script, outside srun
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "a"}, False),
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NODELIST": "a,b"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_COORDINATOR_ADDRESS": "a"}, True),
    ],
)
def test_launchers_are_recognised_by_what_they_set(environment, several):
    assert multihost._several_in(environment) is several


def test_one_process_votes_for_itself():
    vote = multihost.StopVote(sharding.make_mesh(MeshConfig()))
    assert [vote(None), vote(signal.SIGTERM)] == [None, signal.SIGTERM]
