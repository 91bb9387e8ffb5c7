"""Which noise goes with which data in a batch.

Pairs drawn independently cross one another, and the learnt field has to bend where they do. Pairing each noise with
data nearby (minibatch optimal transport; Pooladian et al. 2023, arXiv 2304.14772; Tong et al. 2024, arXiv 2302.00482)
crosses less. For a conditional law that is a trap: the noise then tells about the condition, and a sampler that draws
noise without regard to it meets pairs that training never made, so p(data | condition) comes out biased. The remedy is
to charge for changing the condition as well (Kerrigan et al. 2024, arXiv 2404.04240; Cheng and Schwing 2025,
arXiv 2503.10636): noise i belongs to condition i, and going to data j costs
|noise_i − data_j|² / entries + weight · |c_i − c_j|². With a large weight pairs are exchanged only between equal
conditions, and the conditional law stays as it is.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

Rows = Float[Array, "b *e"]
"""One row per example."""


@dataclasses.dataclass(frozen=True)
class Independent:
    """Noise is paired with actions at random."""

    def couple(self, noise: Rows, data: Rows, condition: Float[Array, "b c"], key: Key[Array, ""]) -> Rows:
        """The noise as it is."""
        return noise


@dataclasses.dataclass(frozen=True)
class OptimalTransport:
    """Noise is paired with the batch's actions by the exact assignment, computed by SciPy on the host."""

    condition_weight: float = 1.0
    """Cost of pairing noise with the actions of another observation, per unit of squared distance between state, prompt
    and images, beside the mean squared difference of noise and actions. At 0 the coupling is the plain one, which
    biases the actions given the observation."""

    def couple(self, noise: Rows, data: Rows, condition: Float[Array, "b c"], key: Key[Array, ""]) -> Rows:
        """The noise in a new order: its row i goes with row i of the data."""
        return noise[assignment(transport_cost(noise, data, condition, self.condition_weight))]


@dataclasses.dataclass(frozen=True)
class Sinkhorn:
    """Noise is paired with the batch's actions by draws from the entropic transport plan, all on the device."""

    condition_weight: float = 1.0
    """As of `OptimalTransport`."""
    regularization: float = 0.05
    """Entropy of the plan, as a share of the mean squared difference of noise and data."""

    def couple(self, noise: Rows, data: Rows, condition: Float[Array, "b c"], key: Key[Array, ""]) -> Rows:
        """The noise of each row of the data; a row of the noise may serve several."""
        cost = transport_cost(noise, data, condition, self.condition_weight)
        moving = transport_cost(noise, data, condition, 0.0)
        plan = sinkhorn(cost, self.regularization * jnp.mean(moving))
        return noise[jax.random.categorical(key, plan, axis=0)]


Coupling = Independent | OptimalTransport | Sinkhorn


def transport_cost(
    noise: Float[Array, "b *e"], data: Float[Array, "b *e"], condition: Float[Array, "b c"], condition_weight: float
) -> Float[Array, "b b"]:
    """Cost of taking noise i to data j: mean squared difference, plus squared distance of conditions times the weight.

    The mean over entries, not their sum, so that a weight means the same whatever the length of a chunk: the sum's
    differences grow with the root of the number of entries, and would outweigh any fixed cost of another condition.
    """
    noise, data = noise.reshape(len(noise), -1), data.reshape(len(data), -1)
    cost = _squared_distances(noise, data) / noise.shape[1]
    return cost + condition_weight * _squared_distances(condition, condition) if condition_weight else cost


def assignment(cost: Float[Array, "b b"]) -> Int[Array, "b"]:
    """For each column the row of the cheapest one-to-one assignment; exact, through SciPy on the host; jits."""
    from scipy.optimize import linear_sum_assignment  # takes a while, and few runs need it

    def solve(cost) -> np.ndarray:
        # A cost that is not finite is not for here to report: the loss is not finite either.
        rows, columns = linear_sum_assignment(np.nan_to_num(np.asarray(cost)))
        return rows[np.argsort(columns)].astype(np.int32)

    shape = jax.ShapeDtypeStruct(cost.shape[1:], jnp.int32)
    return jax.pure_callback(solve, shape, jax.lax.stop_gradient(cost), vmap_method="sequential")


def sinkhorn(
    cost: Float[Array, "b b"], regularization: float | Float[Array, ""], num_iterations: int = 100
) -> Float[Array, "b b"]:
    """Logarithm of the entropic transport plan between uniform margins (Cuturi 2013, arXiv 1306.0895), `[b b]`.

    Args:
        cost: of row i to column j.
        regularization: weight of the entropy, in units of cost; towards 0 the plan becomes the exact assignment.
        num_iterations: of scaling rows, then columns; columns are exact at the end.
    """
    kernel = -cost / regularization

    def scale(plan, _):
        plan = plan - jax.nn.logsumexp(plan, axis=1, keepdims=True)
        return plan - jax.nn.logsumexp(plan, axis=0, keepdims=True), None

    plan, _ = jax.lax.scan(scale, kernel, length=num_iterations)
    return plan - jnp.log(len(cost))


def _squared_distances(a: Float[Array, "b e"], b: Float[Array, "b e"]) -> Float[Array, "b b"]:
    squares = jnp.sum(jnp.square(a), -1)[:, None] + jnp.sum(jnp.square(b), -1)[None]
    return jnp.maximum(squares - 2 * jnp.matmul(a, b.T, precision="highest"), 0.0)
