"""A new solver is one file of the folder: samplers, configurations and objectives find it there."""

import os
import subprocess
import sys

import pi0_jax

SOLVER = '''
"""Ralston's method."""

from __future__ import annotations

import dataclasses

from pi0_jax.sampler.runge_kutta import RungeKutta, Tableau


@dataclasses.dataclass(frozen=True)
class Ralston(RungeKutta):
    """Ralston's method, of order 2."""

    eagerness: float = 1.0
    tableau = Tableau(((), (2 / 3,)), (0.25, 0.75))
'''
PROGRAM = """
import importlib.util
import sys

spec = importlib.util.find_spec("pi0_jax.sampler")
spec.submodule_search_locations.append(sys.argv[1])
sys.modules["pi0_jax.sampler"] = package = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)

import typing

import jax.numpy as jnp

from pi0_jax.checkpoint import policy_from_json, policy_to_json
from pi0_jax.config import PolicyConfig
from pi0_jax.sampler import SAMPLERS, integrate

Ralston = SAMPLERS["Ralston"]
assert Ralston in typing.get_args(typing.get_type_hints(PolicyConfig)["sampler"])
policy = PolicyConfig(robot="tabletop", sampler=Ralston(4, eagerness=2.0))
assert policy_to_json(policy)["sampler"]["type"] == "Ralston"
assert policy_from_json(policy_to_json(policy)) == policy
print(float(integrate(lambda x, t: 2 * t + 0 * x, jnp.ones((1, 1, 1)), policy.sampler).item()))
"""


def test_a_file_in_the_folder_is_a_sampler_of_policies(tmp_path):
    (tmp_path / "ralston.py").write_text(SOLVER)
    root = os.path.dirname(os.path.dirname(pi0_jax.__file__))
    environment = os.environ | {"PYTHONPATH": root, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    # dx/dt = 2 t from 1 at t = 1 ends at 0; a method of order 2 is exact.
    assert abs(float(done.stdout)) < 1e-5
