"""The tabletop with three tasks that are new to a policy of its own six: to bring an object to the table's centre."""

import functools

from pi0_jax.evaluate.simulators import tabletop

ROBOT = tabletop.ROBOT
make = functools.partial(tabletop.make, tasks="centre")
