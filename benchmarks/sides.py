"""Sides of a comparison, each in a process of its own; our models in the sizes that are compared; and tables."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any


class Side:
    """A process that answers each message, a line of JSON, by another one; a context at whose end it ends."""

    def __init__(self, command: Sequence[str], **environment: str):
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | environment
        )

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_):
        self._process.communicate()

    def send(self, **message: Any) -> None:
        assert self._process.stdin is not None
        print(json.dumps(message), file=self._process.stdin, flush=True)

    def receive(self) -> Any:
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return json.loads(line)
        raise SystemExit(f"{self._process.args!r} ended with {self._process.wait()}; its messages are above.")

    def __call__(self, **message: Any) -> Any:
        self.send(**message)
        return self.receive()


def answer(handle: Callable[[dict[str, Any]], Any]) -> None:
    """The other end of `Side`: answers messages until there are no more."""
    replies, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    for line in sys.stdin:
        print(json.dumps(handle(json.loads(line))), file=replies, flush=True)


def our_model(size: dict[str, Any], **fields: Any):
    """A model of ours in one of the sizes that `openpi_jax.resize` gives openpi's."""
    from pi0_jax.config import ExpertConfig, ModelConfig, VisionConfig

    return ModelConfig(
        vision=VisionConfig(**size["vision"], patch_size=size["patch"]),
        language=ExpertConfig(**size["language"]),
        action=ExpertConfig(**size["action"]),
        vocab_size=size["vocab"],
        prompt_length=size["prompt"][fields["variant"]],
        **size["stack"],
        **fields,
    )


def markdown(titles: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in lines)
