import jax.numpy as jnp
import pytest
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import Array, Float, jaxtyped

from tests.typecheck import check


def doubling(rows: str):
    @jaxtyped(typechecker=check)
    def double(x: Float[Array, "b d"], scale: int = len(rows)) -> Float[Array, "b d"]:
        return scale * x if rows == "ok" else x[0]

    return double


def test_functions_in_functions_are_checked_each_time_they_are_made():
    for _ in range(2):
        assert doubling("ok")(jnp.ones((2, 3))).sum() == 12
        for wrong, argument in (("ok", jnp.ones(3)), ("ok", "x"), ("first", jnp.ones((2, 3)))):
            with pytest.raises(TypeError, match="double"):
                doubling(wrong)(argument)
        with pytest.raises(TypeError, match="scale"):
            doubling("ok")(jnp.ones((2, 3)), scale="twice")


def test_what_the_checker_raises_is_beartypes():
    def plain(x: int) -> None: ...

    with pytest.raises(BeartypeCallHintViolation):
        check(plain)("one")
