"""FAST action tokens (Pertsch et al. 2025, arXiv 2501.09747): action chunks as strings of a learned vocabulary.

A chunk is transformed by the cosine transform (DCT-II) along time, each dimension by itself, so that most
coefficients of smooth actions are near zero; multiplied by `scale` and rounded; written coefficient by coefficient
(all dimensions of the first, then of the second) as one character each, U+0000 for `min_token`; and compressed by
byte-pair encoding of the characters' UTF-8 bytes. The format on the disk is that of `physical-intelligence/fast`.

Decoding never fails. One byte that is no continuation byte of UTF-8 is one coefficient; coefficients beyond the chunk
are cut off, missing ones are 0, and values outside the codec's range are clamped to it. A string is valid if nothing
of that was needed.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int32, UInt8

from pi0_jax.atomic import written
from pi0_jax.errors import UserError, require_package

PROCESSOR, TOKENIZER = "processor_config.json", "tokenizer.json"
BESIDE = {
    "special_tokens_map.json": {},
    "tokenizer_config.json": {
        "added_tokens_decoder": {},
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
        "processor_class": "UniversalActionProcessor",
        "tokenizer_class": "PreTrainedTokenizerFast",
    },
}
"""What transformers wants beside the two files that say everything."""
MODULE = "physical-intelligence/fast--processing_action_tokenizer.UniversalActionProcessor"
"""Where transformers finds the processor's code, which we do not copy."""
FEWEST_CODES = 257
"""One per byte, and one for a pair."""
MOST_VALUES = 0xD800
"""Characters from here on are not all valid in UTF-8."""


class RoundTrip(NamedTuple):
    """What encoding chunks and decoding them again does to them."""

    lengths: Int[np.ndarray, "n"]
    """Codes of each chunk."""
    error: Float[np.ndarray, "d"]
    """Root mean squared error of each dimension, in the units of the chunks."""
    largest: Float[np.ndarray, "d"]
    """Largest absolute error of each dimension."""
    lossy: int
    """Chunks that come back shorter, longer or clamped, because the codec lacks bytes or range for them."""
    used: Bool[np.ndarray, "codes"]
    """Codes that occur."""


class FastCodec:
    """Action chunks to codes and back.

    Args:
        tokenizer: content of tokenizer.json, the byte-pair encoding.
        processor: content of processor_config.json. Needed are `scale` and `min_token`; of others ours has
            `max_token`, `time_horizon` and `action_dim`, which are None where a codec is for any chunk.
        source: what errors call it.

    Raises:
        UserError: the files are something else, or the package tokenizers is not installed.
    """

    def __init__(self, tokenizer: bytes, processor: bytes, source: str = "the action codec"):
        self.tokenizer, self.processor = tokenizer, processor
        package = require_package("tokenizers", "fast", "FAST action tokens")
        try:
            self._config: dict[str, Any] = json.loads(processor)
            self._bpe = package.Tokenizer.from_str(tokenizer.decode())
            self.scale, self.min_token = float(self._config["scale"]), int(self._config["min_token"])
            """Factor of the coefficients before rounding; and the rounded coefficient that code point 0 stands for."""
        except Exception as error:  # tokenizers raises bare Exception
            raise UserError(
                f"{source} is no FAST codec: {TOKENIZER} and {PROCESSOR} with scale and min_token are expected, as "
                f"`pi0 data fast` and physical-intelligence/fast have them ({error!r})."
            ) from error
        self.num_codes: int = self._bpe.get_vocab_size()
        """Codes are 0 … num_codes - 1."""
        self.horizon: int | None = self._config.get("time_horizon")
        self.dims: int | None = self._config.get("action_dim")
        """Shape of the chunks that the codec was fitted to; None: any."""

    def __reduce__(self):
        return FastCodec, (self.tokenizer, self.processor)

    @functools.cached_property
    def max_token(self) -> int:
        """Largest rounded coefficient that the codec was made for.

        Foreign fits do not say it; but their vocabularies begin with one character per value, in order.
        """
        if "max_token" in self._config:
            return int(self._config["max_token"])
        vocab = self._bpe.get_vocab()
        values = 0
        while vocab.get(chr(values)) == values:
            values += 1
        return self.min_token + max(values - 1, 0)

    @classmethod
    def load(cls, folder: str | Path) -> FastCodec:
        """Reads a folder in the format of `physical-intelligence/fast`; no code in it is run.

        Raises:
            FileNotFoundError: a file is missing.
            UserError: as of the class.
        """
        folder = Path(folder).expanduser()
        for name in (TOKENIZER, PROCESSOR):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{folder} has no {name}: it is no FAST codec. `pi0 data fast CONFIG --output FOLDER` makes one; "
                    "the published one is `hf download physical-intelligence/fast --local-dir FOLDER`."
                )
        return cls((folder / TOKENIZER).read_bytes(), (folder / PROCESSOR).read_bytes(), str(folder))

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], source: str = "the action codec") -> FastCodec:
        """The codec of `files`, as a checkpoint keeps them; errors as of the class."""
        return cls(files[TOKENIZER], files[PROCESSOR], source)

    @classmethod
    def fit(
        cls,
        chunks: Sequence[Float[np.ndarray, "_n _ah _d"]],
        num_codes: int = 1024,
        scale: int | float = 10,
        *,
        progress: bool = False,
    ) -> FastCodec:
        """A codec for chunks that are like the given ones, normalised ones. The same chunks give the same codec.

        Args:
            chunks: one array per robot, which may differ in dimensions.
            num_codes: at most so many; fewer chunks may have fewer pairs to merge.
            scale: coefficients are rounded to multiples of one over this, so the error of an action is at most about
                half of that.
            progress: show how far the byte-pair encoding is.

        Raises:
            UserError: too few codes for one per byte, or values too large for the scale.
        """
        if num_codes < FEWEST_CODES:
            raise UserError(f"{num_codes} codes are too few: each of the 256 bytes takes one. 1024 is usual.")
        values = [quantize(array, scale) for array in chunks]
        low, high = min(int(each.min()) for each in values), max(int(each.max()) for each in values)
        if high - low >= MOST_VALUES:
            raise UserError(
                f"rounded coefficients go from {low} to {high}, more than {MOST_VALUES} values. Are the actions "
                f"normalised? Or take a smaller scale than {scale:g}."
            )
        texts = (text for each in values for text in to_text(each - low))
        bpe = train_bpe(texts, num_codes, _byte_alphabet(), progress=progress)
        shapes = {each.shape[1:] for each in values}
        horizon, dims = shapes.pop() if len(shapes) == 1 else (None, None)
        processor = {
            "processor_class": "UniversalActionProcessor",
            "auto_map": {"AutoProcessor": MODULE},
            "scale": scale,
            "vocab_size": bpe.get_vocab_size(),
            "min_token": low,
            "max_token": high,
            "time_horizon": horizon,
            "action_dim": dims,
        }
        return cls(bpe.to_str().encode(), json.dumps(processor, indent=2).encode())

    def files(self) -> dict[str, bytes]:
        """Names and contents of the files of a folder that `load` reads, and transformers."""
        beside = {name: json.dumps(content, indent=2).encode() for name, content in BESIDE.items()}
        return {TOKENIZER: self.tokenizer, PROCESSOR: self.processor} | beside

    def save(self, folder: str | Path) -> None:
        """Writes the folder; FileExistsError if there is one."""
        with written(Path(folder)) as partial:
            partial.mkdir()
            for name, content in self.files().items():
                (partial / name).write_bytes(content)

    def encode(self, actions: Float[np.ndarray, "*b ah d"]) -> list[list[int]]:
        """Codes of normalised chunks, one list per chunk, batch axes flattened.

        What is below the codec's range is clamped to it. A byte that a foreign codec has no code for is left out, as
        its own processor does, and its chunk has too few coefficients (`count_values`).
        """
        chunks = actions.reshape(-1, *actions.shape[-2:])
        texts = to_text(np.maximum(quantize(chunks, self.scale) - self.min_token, 0))
        return [encoding.ids for encoding in self._bpe.encode_batch(texts, add_special_tokens=False)]

    def decode(
        self, codes: Sequence[Sequence[int]], horizon: int, dims: int
    ) -> tuple[Float32[np.ndarray, "b {horizon} {dims}"], Bool[np.ndarray, "b"]]:
        """Normalised chunks of strings of codes, and which of the strings are valid: see the module for the others.

        Args:
            codes: one string per chunk; what is outside 0 … num_codes - 1 stands for no byte, and is not valid.
            horizon: actions per chunk.
            dims: dimensions of an action.
        """
        found = np.zeros((len(codes), horizon * dims), np.int64)
        valid = np.zeros(len(codes), bool)
        for row, string in enumerate(codes):
            ids = np.array(string, np.int64).reshape(-1)
            inside = (ids >= 0) & (ids < self.num_codes)
            values, well_formed = bytes_to_values(self._bytes_of(ids[inside]))
            values = values + self.min_token
            clamped = np.clip(values, self.min_token, self.max_token)
            valid[row] = well_formed and inside.all() and len(values) == horizon * dims and (values == clamped).all()
            kept = clamped[: horizon * dims]
            found[row, : len(kept)] = kept
        from scipy.fft import idct  # takes a while, and few runs need it

        coefficients = found.reshape(-1, horizon, dims) / self.scale
        return np.asarray(idct(coefficients, axis=1, norm="ortho"), np.float32), valid

    def count_values(self, codes: Sequence[int]) -> int:
        """Coefficients that begin in a string of codes; a chunk has its horizon times its dimensions."""
        return int(self.num_values[np.array(codes, np.int64)].sum())

    @functools.cached_property
    def code_bytes(self) -> UInt8[np.ndarray, "codes m"]:
        """UTF-8 bytes that each code stands for, zeros behind them."""
        table = np.zeros((self.num_codes, max(map(len, self._strings))), np.uint8)
        for row, string in zip(table, self._strings, strict=True):
            row[: len(string)] = np.frombuffer(string, np.uint8)
        return table

    @functools.cached_property
    def num_bytes(self) -> Int32[np.ndarray, "codes"]:
        """Number of bytes that each code stands for."""
        return np.array([len(string) for string in self._strings], np.int32)

    @functools.cached_property
    def num_values(self) -> Int32[np.ndarray, "codes"]:
        """Coefficients that begin in each code: its bytes that are not continuation bytes."""
        inside = np.arange(self.code_bytes.shape[1]) < self.num_bytes[:, None]
        return (_begins(self.code_bytes) & inside).sum(1, dtype=np.int32)

    @functools.cached_property
    def _strings(self) -> list[bytes]:
        bytes_of = {character: byte for byte, character in enumerate(_byte_alphabet())}
        strings = [b""] * self.num_codes
        for token, code in self._bpe.get_vocab().items():
            known = set(token) <= bytes_of.keys()  # otherwise it is taken as it is, as ByteLevel does
            strings[code] = bytes(bytes_of[character] for character in token) if known else token.encode()
        return strings

    def _bytes_of(self, codes: Int[np.ndarray, "n"]) -> UInt8[np.ndarray, "m"]:
        table = self.code_bytes
        return table[codes][np.arange(table.shape[1]) < self.num_bytes[codes][:, None]]


def round_trip(codec: FastCodec, chunks: Float[np.ndarray, "n ah d"], at_once: int = 4096) -> RoundTrip:
    """Encodes chunks and decodes them again."""
    lengths, used, lossy = [], np.zeros(codec.num_codes, bool), 0
    squares, largest = np.zeros(chunks.shape[-1]), np.zeros(chunks.shape[-1])
    for start in range(0, len(chunks), at_once):
        part = chunks[start : start + at_once]
        codes = codec.encode(part)
        decoded, valid = codec.decode(codes, *chunks.shape[1:])
        lengths += [len(each) for each in codes]
        used[np.concatenate([np.array(each, np.int64) for each in codes])] = True
        lossy += int((~valid).sum())
        error = np.abs(decoded - part)
        squares += np.square(error).sum((0, 1))
        largest = np.maximum(largest, error.max((0, 1)))
    return RoundTrip(np.array(lengths), np.sqrt(squares / (len(chunks) * chunks.shape[1])), largest, lossy, used)


def hold(actions: Float[np.ndarray, "b ah d"], valid: Bool[np.ndarray, "b ah"]) -> Float[np.ndarray, "b ah d"]:
    """Chunks that end with the last action that is to be learnt, repeated: codes have no mask for single steps. Without
    any, the first one is repeated."""
    last = np.maximum(np.logical_and.accumulate(valid, axis=1).sum(1) - 1, 0)
    steps = np.minimum(np.arange(actions.shape[1]), last[:, None])
    return np.take_along_axis(actions, steps[..., None], axis=1)


def quantize(chunks: Float[np.ndarray, "*b ah d"], scale: int | float) -> Int[np.ndarray, "*b ah d"]:
    """Rounded coefficients of the cosine transform along time, the first the lowest frequency; halves to even."""
    from scipy.fft import dct

    return np.around(np.asarray(dct(chunks, axis=-2, norm="ortho")) * scale).astype(np.int64)


def to_text(values: Int[np.ndarray, "n ah d"]) -> list[str]:
    """One character per value, which are 0 or more; the last, U+10FFFF, for all above. Surrogates, which no text can
    have, are U+FFFD."""
    values = np.minimum(values, 0x10FFFF)
    values = np.where((values >= MOST_VALUES) & (values < 0xE000), 0xFFFD, values)
    return ["".join(map(chr, row)) for row in values.reshape(len(values), -1).tolist()]


def bytes_to_values(content: UInt8[np.ndarray, "n"]) -> tuple[Int[np.ndarray, "k"], bool]:
    """Code points of UTF-8 bytes, well-formed or not, and whether they are.

    Each byte that is no continuation byte begins one. It takes as many of the continuation bytes behind it as it
    announces; others are left out, and missing ones are zeros.
    """
    begins = _begins(content)
    starts = np.flatnonzero(begins)
    first = content[starts].astype(np.int64)
    announced = (first >= 0xC0).astype(int) + (first >= 0xE0) + (first >= 0xF0)
    values = (first & np.array([0x7F, 0x1F, 0x0F, 0x07])[announced]) << 6 * announced
    owner = np.cumsum(begins) - 1  # of each byte; -1: before all
    rest = np.flatnonzero(~begins & (owner >= 0))
    place = announced[owner[rest]] - (rest - starts[owner[rest]])  # from the end of its character
    taken = rest[place >= 0]
    np.add.at(values, owner[taken], (content[taken].astype(np.int64) & 0x3F) << 6 * place[place >= 0])
    followed = np.diff(starts, append=len(content)) - 1
    return values, bool((followed == announced).all() and begins[:1].all())


def _begins(content: UInt8[np.ndarray, "*b"]) -> Bool[np.ndarray, "*b"]:
    """Where a byte begins a character of UTF-8."""
    return (content & 0xC0) != 0x80


def train_bpe(texts: Iterable[str], num_codes: int, alphabet: Sequence[str], *, progress: bool = False) -> Any:
    """A byte-pair encoding of texts, a `tokenizers.Tokenizer`, as `physical-intelligence/fast` was fitted.

    Args:
        texts: one per chunk.
        num_codes: at most so many, the alphabet's among them.
        alphabet: symbols that have a code even if they do not occur, beside those that do.
        progress: show a bar.
    """
    package = require_package("tokenizers", "fast", "FAST action tokens")
    bpe = package.Tokenizer(package.models.BPE())
    bpe.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = package.decoders.ByteLevel()
    bpe.post_processor = package.processors.ByteLevel(trim_offsets=False)
    trainer = package.trainers.BpeTrainer(
        vocab_size=num_codes,
        min_frequency=2,
        show_progress=progress,
        special_tokens=[],
        initial_alphabet=list(alphabet),
        max_token_length=10000,
    )
    bpe.train_from_iterator(texts, trainer=trainer)
    return bpe


@functools.cache
def _byte_alphabet() -> tuple[str, ...]:
    """The character that stands for each byte in a byte-level vocabulary: itself where it is printable, and the next
    one from U+0100 where it is not (Radford et al. 2019, GPT-2)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return tuple(chr(byte) if byte in printable else chr(next(others)) for byte in range(256))
