"""What a language expert learns to write after its prompt, as ids of its vocabulary: text, then action tokens.

    text       {subtask or answer}  EOS
    actions    [BOS]  "Action: "  codes  |  EOS

Code t of the FAST codec is id vocab_size - 1 - skip - t. With a table of its own it is vocab_size + t, "Action: " is
given and not learnt, and there is no end. Text that is longer than its room is cut, and still ends with EOS, so that a
policy never writes more than there is room for; a chunk of too many codes loses its last ones. Both are counted in the
log.
"""

# pyright: reportTypedDictNotRequiredAccess=false
from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from pi0_jax.batch import CodecTables, Targets
from pi0_jax.config import Fast, PolicyConfig
from pi0_jax.data.fast import FastCodec, hold
from pi0_jax.data.robots import Robot
from pi0_jax.data.source import text_of
from pi0_jax.data.tokenizer import Tokenizer
from pi0_jax.data.transform import Sample, Transform, identity
from pi0_jax.errors import UserError, listed

MARKER, BAR = "Action: ", "|"
EVERY_PROMPT = f"Task: , State: 0 1 2 3 4 5 6 7 8 9;\nSubtask: {MARKER}{BAR}"
"""What is written whatever the instructions are."""
MOST_TEXTS = 20_000
"""Instructions and texts that are looked through for ids that codes have, too."""
SHOWN = 8
"""Tokens that messages name."""

_log = logging.getLogger(__name__)


class ActionTokens:
    """The ids in which a vocabulary writes action chunks.

    Args:
        codec: of the chunks.
        fast: which ids the codes have, and how many there may be.
        tokenizer: of the prompts.
        vocab_size: of the model.
        texts: words that are written with the same vocabulary, beside those of every prompt.

    Raises:
        UserError: codes and text do not fit into the vocabulary together.
    """

    def __init__(self, codec: FastCodec, fast: Fast, tokenizer: Tokenizer, vocab_size: int, texts: Iterable[str] = ()):
        self.codec, self.room, self.table = codec, fast.max_tokens, fast.own_table
        """`table`: codes that are not of the vocabulary, but ids above it."""
        self.first = vocab_size - 1 - fast.skip
        """Id of code 0; the others are below."""
        self.given = int(fast.bos)
        """How many of the ids are not learnt, the first ones."""
        self.marker = [tokenizer.bos_id] * self.given + tokenizer.encode(MARKER)
        self.end = [*tokenizer.encode(BAR), tokenizer.eos_id]
        if len(self.end) != 2:
            raise UserError(f"the tokenizer writes {BAR!r}, the end of action tokens, as {len(self.end) - 1} tokens.")
        if self.room <= (least := len(self.marker) + (0 if self.table else len(self.end))):
            raise UserError(f"codec.max_tokens is {self.room}, and marker and end take {least} of them: 256 is usual.")
        if self.table:
            if self.table < codec.num_codes:
                raise UserError(
                    f"the action codec has {codec.num_codes} codes, and codec.own_table {self.table}: take as many."
                )
            self.first, self.given = vocab_size, len(self.marker)
            return
        lowest = self.first - codec.num_codes + 1
        taken = {token for text in (*texts, EVERY_PROMPT) for token in tokenizer.encode(text)}
        clash = sorted(token for token in taken if lowest <= token <= self.first)
        if clash or lowest <= tokenizer.eos_id:
            pieces = listed([tokenizer.piece(token) for token in clash], SHOWN)
            why = f" The texts are written with {pieces} of these." if clash else ""
            why += " Leave PaliGemma's locations free: codec.skip 1152." if "<loc" in pieces else ""
            raise UserError(
                f"the action codec has {codec.num_codes} codes, which take the ids {lowest} to {self.first} of a "
                f"vocabulary of {vocab_size}.{why} Raise `model.vocab_size` to "
                f"{tokenizer.vocab_size + codec.num_codes + fast.skip}, or fit a codec of fewer codes: pi0 data fast "
                "CONFIG --vocab 512"
            )

    def ids(self, codes: list[int]) -> list[int]:
        """Ids of a chunk, however many."""
        if self.table:
            return [*self.marker, *(self.first + code for code in codes)]
        return [*self.marker, *(self.first - code for code in codes), *self.end]

    def tables(self, dims: int) -> CodecTables:
        """What a compiled program decodes with, for a robot of `dims` action dimensions in the model."""
        codec = self.codec
        return CodecTables(
            code_bytes=jnp.asarray(codec.code_bytes),
            num_bytes=jnp.asarray(codec.num_bytes),
            min_token=jnp.int32(codec.min_token),
            max_token=jnp.int32(codec.max_token),
            scale=jnp.float32(codec.scale),
            dims=jnp.int32(dims),
            marker=jnp.asarray(self.marker, jnp.int32),
            bar=jnp.int32(self.end[0]),
            eos=jnp.int32(self.end[1]),
        )


class Count:
    """A count of what does not go as it should, which the log is told of: the first, the tenth, the hundredth."""

    def __init__(self, what: str):
        self._what, self._seen, self._bad, self._next = what, 0, 0, 1

    def add(self, bad: bool) -> None:
        """Counts one."""
        self._seen += 1
        self._bad += bad
        if bad and self._bad >= self._next:
            self._next *= 10
            _log.warning("%d of %d %s", self._bad, self._seen, self._what)


def target_transform(
    policy: PolicyConfig, tokenizer: Tokenizer, codec: FastCodec | None, instructions: Iterable[str]
) -> Transform:
    """The transform that adds what a policy's objective learns as tokens; nothing where it learns none.

    Args:
        policy: its objective and model.
        tokenizer: of the prompts.
        codec: of the actions, where the objective has one.
        instructions: of the demonstrations, with what is to be written after them.

    Raises:
        UserError: there is text, and the objective writes none; or as of `ActionTokens`.
    """
    objective, model = policy.objective, policy.model
    instructions = list(instructions)
    texts = [text for each in instructions if (text := text_of(each))]
    room = objective.text_tokens
    if texts and not room:
        raise UserError(
            f"the datasets have {len(texts)} texts to be written, such as {texts[0]!r} (`prompt_from` predict, or "
            f"image-text pairs); objective {type(objective).__name__} writes none: take Joint with text_tokens above 0."
        )
    words = [*dict.fromkeys([*instructions, *texts])][:MOST_TEXTS]
    actions = None
    if codec is not None and objective.codec is not None:
        actions = ActionTokens(codec, objective.codec, tokenizer, model.vocab_size, words)
    return write_targets(tokenizer, actions, room) if room or actions else identity


def check_shape(codec: FastCodec, horizon: int, dims: int, robot: str) -> None:
    """Raises UserError if a codec was fitted to chunks of another shape."""
    fitted = codec.horizon or horizon, codec.dims or dims
    if fitted != (horizon, dims):
        raise UserError(
            f"the action codec was fitted to chunks of {fitted[0]} actions of {fitted[1]} dimensions; those of {robot} "
            f"have {horizon} of {dims}. Fit one to them: pi0 data fast CONFIG --output FOLDER"
        )


def tables_of(policy: PolicyConfig, robot: Robot, tokenizer: Tokenizer, codec: FastCodec | None) -> CodecTables | None:
    """What a policy's program decodes action tokens with; None where its objective has none.

    Raises:
        UserError: it acts by tokens and there is no codec, or one of other chunks; or as of `ActionTokens`.
    """
    objective, dims = policy.objective, len(robot.model_actions)
    if objective.codec is None or codec is None:
        if objective.decodes and objective.codec is not None:
            raise UserError(
                "this policy acts by FAST action tokens, and its checkpoint holds no codec to read them by. Add the "
                "one it was trained with: pi0 convert SOURCE TARGET --codec FOLDER (for released weights, "
                "physical-intelligence/fast)."
            )
        return None
    check_shape(codec, policy.model.action_horizon, dims, robot.name)
    return ActionTokens(codec, objective.codec, tokenizer, policy.model.vocab_size).tables(dims)


def write_targets(tokenizer: Tokenizer, actions: ActionTokens | None, text_room: int) -> Transform:
    """A transform that adds `targets` to samples with `text` or `actions`, which are normalised and of the robot's own
    dimensions. Has no inverse.

    Args:
        tokenizer: of the text.
        actions: how chunks are written; None: they are not.
        text_room: tokens that the text may have, EOS among them; 0: none is written.
    """
    length = text_room + (actions.room if actions else 0)
    given = actions.given if actions else 0
    cut = Count(f"texts were cut to {text_room} tokens. Raise the objective's text_tokens.")
    chunks = ChunkCounts(
        Count(
            f"action chunks were cut to {length - text_room} tokens. Raise the objective's codec.max_tokens, or fit a "
            "codec with a smaller --scale."
        ),
        Count(
            "action chunks lack coefficients, because the codec has no codes for some of their bytes. Fit one that "
            "has: pi0 data fast"
        ),
    )

    def forward(sample: Sample) -> Sample:
        if "actions" not in sample and "text" not in sample:  # a robot acts
            return sample
        batch = np.shape(sample["state"])[:-1]
        rows = int(np.prod(batch))
        written = np.broadcast_to(np.asarray(sample.get("text", ""), object), batch).ravel()
        text = [_cut_text(tokenizer, str(each), text_room, cut) if text_room else [] for each in written]
        codes = [[] for _ in range(rows)]
        if actions is not None and "actions" in sample and np.all(sample.get("has_actions", True)):
            codes = _chunk_ids(actions, sample["actions"], sample.get("step_mask"), chunks)
        tokens = np.zeros((rows, length), np.int32)
        mask, loss_mask, is_action = (np.zeros((rows, length), bool) for _ in range(3))
        for row, (first, then) in enumerate(zip(text, codes, strict=True)):
            place, end = len(first), len(first) + len(then)
            tokens[row, :end] = [*first, *then]
            mask[row, :end] = loss_mask[row, :end] = True
            is_action[row, place:end] = True
            loss_mask[row, place : place + given] = False
        arrays: Any = (each.reshape(*batch, length) for each in (tokens, mask, loss_mask, is_action))
        added: Sample = {"targets": Targets(*arrays)}
        return sample | added

    return Transform(forward, lambda sample: sample)


def _cut_text(tokenizer: Tokenizer, text: str, room: int, cut: Count) -> list[int]:
    """Ids of a text and EOS; none of an empty one."""
    if not text.strip():
        return []
    ids = tokenizer.encode(text.strip())
    cut.add(len(ids) >= room)
    return [*ids[: room - 1], tokenizer.eos_id]


class ChunkCounts(NamedTuple):
    """What does not go as it should with chunks."""

    cut: Count
    lossy: Count


def _chunk_ids(
    actions: ActionTokens, values: np.ndarray, steps: np.ndarray | None, counts: ChunkCounts
) -> list[list[int]]:
    values = values.reshape(-1, *values.shape[-2:])
    if steps is not None:
        values = hold(values, steps.reshape(len(values), -1))
    found = []
    for codes in actions.codec.encode(values):
        ids = actions.ids(codes)
        counts.cut.add(len(ids) > actions.room)
        counts.lossy.add(actions.codec.count_values(codes) < values[0].size)
        found.append(ids[: actions.room])
    return found
