"""How updates are compiled."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pi0_jax.plan.compile import compile_program
from pi0_jax.plan.devices import find_devices, has_gpu_compiler
from pi0_jax.training.program import OVERLAP, compiler_options


@pytest.mark.parametrize(
    ("platform", "devices", "flags", "options"),
    [
        ("cuda", 8, "", {OVERLAP: True}),
        ("gpu", 2, "--xla_gpu_autotune_level=0", {OVERLAP: True}),
        ("gpu", 2, f"--{OVERLAP}=false", {}),
        ("gpu", 1, "", {}),
        ("cpu", 8, "", {}),
        ("tpu", 8, "", {}),
    ],
)
def test_updates_on_several_gpus_send_beside_kernels(monkeypatch, platform, devices, flags, options):
    monkeypatch.setenv("XLA_FLAGS", flags)
    assert compiler_options(platform, devices) == options


def test_xla_knows_the_option():
    added = jax.jit(lambda x: x + 1, compiler_options={OVERLAP: True})
    assert added(jnp.zeros(())) == 1
    with pytest.raises(Exception, match="No such compile option"):
        jax.jit(lambda x: x + 1, compiler_options={"xla_gpu_no_such_option": True})(jnp.zeros(()))


def test_gpus_that_are_not_there_have_the_platform_of_those_that_are():
    if not has_gpu_compiler():
        pytest.skip("XLA's compiler for NVIDIA GPUs is not installed: extra cuda12, no GPU needed")
    assert compiler_options(find_devices("a100:2")[1][0].platform, 2)


def test_what_a_layer_gathers_goes_beside_the_products_of_another():
    if not has_gpu_compiler():
        pytest.skip("XLA's compiler for NVIDIA GPUs is not installed: extra cuda12, no GPU needed")
    _, found, device = find_devices("a100:8")
    mesh = jax.sharding.Mesh(np.array(found), ("x",))
    split, whole = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in ((None, None, "x"), ()))

    def loss(weights, x):
        def layer(x, w):
            first, second = jax.lax.with_sharding_constraint(w, whole)
            return jax.nn.gelu(x @ first) @ second, None

        return jnp.sum(jax.lax.scan(layer, x, weights)[0].astype(jnp.float32))

    weights = jax.ShapeDtypeStruct((4, 2, 1024, 1024), jnp.bfloat16, sharding=split)
    x = jax.ShapeDtypeStruct((4096, 1024), jnp.bfloat16, sharding=jax.NamedSharding(mesh, jax.P("x")))
    beside = []
    for ours in ({}, compiler_options("cuda", 8)):
        lowered = jax.jit(jax.grad(loss), compiler_options=ours).lower(weights, x)
        played = compile_program(lowered, found[0], device, triton=False).timeline
        assert played is not None
        beside.append(played.beside / played.sent)
    assert beside[0] == 0 < beside[1]
