"""What a program is traced for: which of the forms that give the same numbers is the fast one depends on it."""

from __future__ import annotations

import contextlib
import contextvars
import os
import re
from collections.abc import Iterator
from typing import Literal

import jax

from pi0_jax.errors import UserError

Platform = Literal["cpu", "gpu", "tpu"]
KERNELS = "PI0_KERNELS"
"""Environment variable: "0" leaves everything to XLA."""

_plain = contextvars.ContextVar("plain", default=False)
_target: contextvars.ContextVar[Platform | None] = contextvars.ContextVar("target", default=None)


def platform() -> str:
    """The platform that is traced for: that of `tracing_for`, otherwise JAX's default backend."""
    return _target.get() or jax.default_backend()


@contextlib.contextmanager
def tracing_for(target: Platform) -> Iterator[None]:
    """Traces within for devices of another platform than the default one, such as those that are not there."""
    token = _target.set(target)
    try:
        yield
    finally:
        _target.reset(token)


def kernels() -> bool:
    """Whether our own kernels are used: on NVIDIA GPUs since Ampere, unless PI0_KERNELS is "0"."""
    if platform() != "gpu" or os.environ.get(KERNELS, "1") == "0" or _plain.get():
        return False
    if _target.get() is not None:
        return True
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))
    return re.fullmatch(r"\d+\.\d+", capability) is not None and float(capability) >= 8  # AMD's are names


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """Traces within for XLA alone, as for programs that are differentiated: our kernels have no gradients."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


@contextlib.contextmanager
def advice() -> Iterator[None]:
    """Says how to do without our own kernels where a program that has some fails within.

    Raises:
        UserError: a program failed, for another reason than memory.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:  # of XLA, and of Pallas
        if not kernels() or ("RESOURCE_EXHAUSTED" in str(error) and "hared memory" not in str(error)):
            raise
        raise UserError(
            f"a program with pi0_jax's own GPU kernels failed: {str(error).splitlines()[0]}\nSet {KERNELS}=0 in the "
            "environment to leave everything to XLA, which is slower. Please report the message with your GPU and "
            "`python -c 'import jax; jax.print_environment_info()'`."
        ) from error


def aligned(length: int, to: int) -> int:
    """The length that an axis is padded to for sampling: a multiple, for TPUs' tiles and for our own kernels."""
    return -(-length // to) * to if platform() == "tpu" or kernels() else length
