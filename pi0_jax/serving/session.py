"""What the server remembers of one client."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass
class Session:
    """One client's connection, from the policy's point of view. It is never in two batches at once."""

    name: str
    answered: int = 0
    """Requests answered since the connection, or since its last reset."""
    memory: Any = None
    """The policy's own, whatever it wants to know at the next request: a chunk that is being executed, for instance."""

    def reset(self) -> None:
        """Forgets what was, as before a new episode."""
        self.answered, self.memory = 0, None
