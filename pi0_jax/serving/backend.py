"""The interface of a policy behind the server; `robot_policy` implements it for a checkpoint, `replicas` for fleets."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable


@dataclasses.dataclass
class Session:
    """State of one client's connection. It is never in two batches at once."""

    name: str
    answered: int = 0
    """Requests answered since the connection, or since its last reset."""
    memory: Any = None
    """The policy's own state, such as the last chunk."""
    subtask: tuple[str, int] | None = None
    """That of the last chunk, and for how many more chunks it holds; None: there is none."""

    def reset(self) -> None:
        """Resets to the state of a new connection, as before a new episode."""
        self.answered, self.memory, self.subtask = 0, None, None


@runtime_checkable
class PolicyBackend(Protocol):
    """A policy as the server calls it. `validate` may run in many threads at once, `infer_batch` in `parallel` of them,
    and never for one session in two."""

    metadata: dict[str, Any]
    """What a client receives when it connects: anything that `pack` encodes."""
    batch_sizes: tuple[int, ...]
    """Numbers of requests that a program is compiled for, ascending. Others are padded to the next."""
    parallel: int
    """Batches that can be computed at once."""

    def warm_up(self) -> dict[int, float]:
        """Compiles everything, so that no request compiles; returns a batch's seconds by batch size."""
        ...

    def validate(self, request: Any) -> Any:
        """Converts a decoded request to what `infer_batch` takes; the client gets the message of a ValueError."""
        ...

    def infer_batch(self, observations: Sequence[Any], sessions: Sequence[Session]) -> list[dict[str, Any]]:
        """Answers, each with `actions` `[ah, d]`; its other entries go to the client too.

        No answer may depend on the others of its batch. `sessions` are the clients', in the same order.
        """
        ...
