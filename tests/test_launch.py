"""The launch files parse, their parts fit one another, and their command lines are flags that exist."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import jax
import pytest
import yaml

from pi0_jax.config import MeshConfig, PolicyConfig, TrainConfig
from pi0_jax.config_file import load_config, parse
from pi0_jax.training import sharding

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
PRESETS = sorted((ROOT / "configs" / "sharding").glob("*.py"))


@pytest.mark.parametrize("path", [*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")], ids=lambda path: path.name)
def test_scripts_are_ones_that_a_shell_reads(path):
    shell = path.read_text().splitlines()[0].removeprefix("#!/bin/")
    subprocess.run([shell, "-n", path], check=True)


def test_the_ray_program_compiles():
    compile((LAUNCH / "ray_train.py").read_text(), "ray_train.py", "exec")


@pytest.mark.parametrize("path", [*LAUNCH.glob("*.yaml")], ids=lambda path: path.name)
def test_the_numbers_of_a_jobset_fit_one_another(path):
    content = yaml.safe_load(path.read_text())
    assert content["kind"] == "JobSet"
    (job,) = content["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert spec["parallelism"] == spec["completions"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    shell, script, *flags = container["command"]
    assert (shell, script) == ("sh", "launch/k8s_train.sh")
    assert (ROOT / script).is_file()
    assert flags[0] == "--sharding"
    assert (ROOT / flags[1]) in PRESETS
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert {"CONFIG", "RUN_DIR", "NUM_STEPS"} <= environment.keys()
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    if "JAX_COORDINATOR_ADDRESS" in environment:
        name = content["metadata"]["name"]
        host, port = environment["JAX_COORDINATOR_ADDRESS"].split(":")
        assert host == f"{name}-{job['name']}-0-0.{name}"
        assert int(port) in [entry["containerPort"] for entry in container["ports"]]
        assert int(environment["JAX_NUM_PROCESSES"]) == job["replicas"] * spec["completions"]
    else:
        assert load_config(ROOT / flags[1], MeshConfig).slices == job["replicas"]


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_the_ways_of_dividing_the_work_fit_eight_devices(path):
    preset = load_config(path, MeshConfig)
    mesh = sharding.make_mesh(preset, None if path.stem != "single" else jax.devices()[:1])
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert f"--sharding configs/sharding/{path.name}" in path.read_text()


@pytest.mark.parametrize("path", [*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")], ids=lambda path: path.name)
def test_flags_in_scripts_exist(path):
    values = {"--run-dir": "r", "--num-steps": "1", "--mesh.slices": "1", "--mesh.data": "1", "--mesh.fsdp": "-1"}
    values |= {"--hosts.cluster": "gcetpu"}
    words = shlex.split(path.read_text().replace("\\\n", " "), comments=True)
    flags = {flag for word in words for flag in word.split() if flag.startswith(("--mesh", "--hosts", "--run-dir"))}
    assert flags
    config = TrainConfig(policy=PolicyConfig(robot="aloha"))
    parse(config, [part for flag in sorted(flags) for part in (flag, values[flag])], prog="pi0 train", description="")


FAKE = """#!/bin/sh
echo "$@" > "$OUT"
trap 'echo saved >> "$OUT"; exit 0' TERM
if [ -n "$FINISH" ]; then mkdir -p "$RUN_DIR/checkpoints/9"; exit 0; fi
[ -z "$CODE" ] || exit "$CODE"
while :; do sleep 0.05; done
"""


def in_container(tmp_path: Path, *, stop: bool = False, **environment: str) -> tuple[int, list[str]]:
    """Runs what a container runs with a stand-in for `pi0`; exit code, and what that was given and did."""
    fake, out = tmp_path / "bin" / "pi0", tmp_path / "out"
    fake.parent.mkdir(exist_ok=True)
    fake.write_text(FAKE)
    fake.chmod(0o755)
    own = {"PATH": f"{fake.parent}:{os.environ['PATH']}", "CONFIG": "c.py", "RUN_DIR": str(tmp_path / "run")}
    own |= {"NUM_STEPS": "9", "OUT": str(out), "FINISH": "", "CODE": ""}
    process = subprocess.Popen(["sh", LAUNCH / "k8s_train.sh", "--seed", "1"], env=own | environment)
    if stop:
        while not out.exists() or not out.read_text():
            time.sleep(0.05)
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
    code = process.wait(timeout=20)
    return code, out.read_text().splitlines()


def test_a_container_that_is_stopped_saves_asks_to_be_started_again_and_then_resumes(tmp_path):
    run = ["train", "c.py", "--run-dir", str(tmp_path / "run"), "--num-steps", "9"]
    code, lines = in_container(tmp_path, stop=True)
    assert (code, lines) == (75, [" ".join([*run, "--seed", "1"]), "saved"])
    assert in_container(tmp_path, CODE="3")[0] == 3
    code, _ = in_container(tmp_path, FINISH="1")
    assert code == 0
    code, lines = in_container(tmp_path, FINISH="1")
    assert (code, lines) == (0, [" ".join([*run, "--resume", "--seed", "1"])])
