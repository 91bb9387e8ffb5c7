"""Prompts as token ids: a SentencePiece model, and the prompt formats of π0, π0.5 and π0-FAST.

    π0        BOS  {instruction}  newline
    π0.5      BOS  Task: {instruction}, State: {state};  newline  "Action: "
    π0-FAST   BOS  Task: {instruction}, State: {state};  newline

A prompt that asks for text, before actions, ends with "Subtask: ". The state is the normalised one, each dimension an
integer of 0 to 255 over [-1, 1]. The released weights need PaliGemma's own model file; a small one can be trained on
the instructions for weights that start at random.
"""

from __future__ import annotations

import functools
import io
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import sentencepiece
from jaxtyping import Bool, Float, Int32

from pi0_jax.errors import UserError

STATE_BINS = np.linspace(-1, 1, 256 + 1)[:-1]
"""Left edges of the bins of π0.5's state."""


class Tokenizer:
    """Turns prompts into token ids with a SentencePiece model.

    `source` is what errors call it.

    Raises:
        UserError: `model` is no SentencePiece model, or has no token for the beginning of a sequence.
    """

    def __init__(self, model: bytes, source: str = "the tokenizer"):
        self.model = model
        """Content of the model file, so that a checkpoint can hold it."""
        try:
            if not model:
                raise RuntimeError("it is empty")
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            self.vocab_size: int = self._processor.vocab_size()
            """Token ids are below this."""
        except RuntimeError as error:
            raise UserError(
                f"{source} is not a SentencePiece model ({len(model)} bytes; {error}). Expected a file such as "
                "PaliGemma's `paligemma_tokenizer.model`; a Hugging Face `tokenizer.json` is another format."
            ) from error
        if self._processor.bos_id() < 0:
            raise UserError(f"{source} has no BOS token, which every prompt of π0 starts with. Use PaliGemma's model.")
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        self._encode = functools.lru_cache(maxsize=4096)(self._processor.encode)
        self._warned = False

    def __reduce__(self):
        return Tokenizer, (self.model,)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Reads a SentencePiece model file.

        Raises:
            FileNotFoundError: there is no such file.
            UserError: it is something else.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"there is no tokenizer file {path}. Released weights need PaliGemma's SentencePiece model; leave "
                "`data.tokenizer` at None to train a small one on the instructions."
            )
        return cls(Path(path).read_bytes(), source=str(path))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Trains a small model on instructions; the same texts give the same model.

        Bytes stand in for characters that the texts lack, so that any text can be encoded. Special ids are Gemma's:
        padding 0, EOS 1, BOS 2, unknown 3. Each digit is a token. `vocab_size` is the largest number of tokens; few
        texts give fewer.

        Raises:
            UserError: there is no text, or `vocab_size` has no room for bytes and characters.
        """
        cleaned = sorted({_clean(text) for text in texts})
        if not any(cleaned):
            raise UserError("a tokenizer cannot be trained without text; it was given no instruction.")
        scaffold = [f"Task: {text}, State: -1 0 1 2 3 4 5 6 7 8 9;" for text in cleaned] + ["Action: "]
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(cleaned + scaffold),
                model_writer=model,
                model_type="bpe",
                vocab_size=vocab_size,
                hard_vocab_limit=False,
                pad_id=0,
                eos_id=1,
                bos_id=2,
                unk_id=3,
                byte_fallback=True,
                split_digits=True,
                add_dummy_prefix=False,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                character_coverage=1.0,
                num_threads=1,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise UserError(
                f"no tokenizer of {vocab_size} tokens can be trained on {len(cleaned)} texts ({error}). "
                "It needs 4 special tokens, 256 bytes and each character of the texts: try 512."
            ) from error
        return cls(model.getvalue())

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without BOS and EOS."""
        return list(self._encode(text))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids; those beyond the vocabulary are left out."""
        return self._processor.decode([token for token in tokens if token < self.vocab_size])

    def piece(self, token: int) -> str:
        """The text of a token id; "" beyond the vocabulary."""
        return self._processor.id_to_piece(token) if 0 <= token < self.vocab_size else ""

    def encode_prompt(
        self, prompt: str, length: int, state: Float[np.ndarray, "d"] | None = None, ending: str | None = None
    ) -> tuple[Int32[np.ndarray, "p"], Bool[np.ndarray, " p"]]:
        """Token ids of a prompt, padded or cut to `length`, and a mask that is False at padding.

        Where π0.5's is too long, the instruction loses its last words, and never the state or what comes after it.

        `state` is None for π0's format; for the others the normalised state, without padding, which has to fit by
        itself (`UserError`). `ending` is what comes after the last newline; None: π0's and π0.5's.
        """
        words = _clean(prompt).split(" ")
        ids = self._prompt_ids(words, state, ending)
        if (whole := len(ids)) > length and not self._warned:
            self._warned = True
            warnings.warn(
                f"a prompt of {whole} tokens was cut to {length}: {prompt!r}. Raise `model.prompt_length`. "
                "Further cuts are not reported.",
                stacklevel=2,
            )
        while (state is not None or ending) and len(ids) > length:
            if not words:
                raise UserError(
                    f"the state alone takes {len(ids)} tokens of the prompt, which has {length}. Raise "
                    "`model.prompt_length`; the released π0.5 has 200."
                )
            words.pop()
            ids = self._prompt_ids(words, state, ending)
        ids = ids[:length]
        padding = length - len(ids)
        return np.array(ids + [0] * padding, np.int32), np.array([True] * len(ids) + [False] * padding)

    def _prompt_ids(self, words: list[str], state: np.ndarray | None, ending: str | None) -> list[int]:
        text = " ".join(words)
        if state is None:
            return [self.bos_id, *self._encode(text), *self._encode(f"\n{ending or ''}")]
        bins = " ".join(map(str, discretize(state).tolist()))
        ending = "Action: " if ending is None else ending
        return [self.bos_id, *self._encode(f"Task: {text}, State: {bins};\n{ending}")]


def discretize(state: Float[np.ndarray, "*b d"]) -> np.ndarray:
    """The integers that π0.5 reads the normalised state as: 0 to 255 over [-1, 1], 255 above, -1 below."""
    return np.digitize(state, STATE_BINS) - 1


def _clean(prompt: str) -> str:
    return prompt.strip().replace("_", " ").replace("\n", " ")
