"""The FAST codec against the published processor's arithmetic and the library that its vocabulary was trained by."""

import json

import numpy as np
import pytest

from pi0_jax.config import Fast
from pi0_jax.data.fast import TOKENIZER, FastCodec, bytes_to_values, quantize, to_text, train_bpe
from pi0_jax.data.targets import ActionTokens
from pi0_jax.data.tokenizer import Tokenizer
from tests.conftest import fixtures_root

pytest.importorskip("tokenizers")


def cases() -> list:
    """Each fitted codec of each folder that has `NAME.tokenizer.json` files; [None] where there is none."""
    found = [
        (path.parent, path.name.removesuffix(f".{TOKENIZER}"))
        for path in sorted(fixtures_root().glob(f"fast_codec*/*.{TOKENIZER}"))
    ]
    return found or [None]


@pytest.fixture(params=cases(), ids=lambda case: case and "-".join((case[0].name, case[1])))
def case(request, fixtures):
    """Name, settings, arrays and codec of a fit."""
    if request.param is None:
        pytest.skip("no folder of FAST codecs among the fixtures")
    folder, name = request.param
    config = json.loads((folder / "config.json").read_text())[name]
    arrays = np.load(folder / "io.npz")
    processor = json.dumps({key: config[key] for key in ("scale", "min_token")}).encode()
    io = {key.removeprefix(f"{name}/"): arrays[key] for key in arrays.files if "/" not in key or key.startswith(name)}
    return config, io, FastCodec((folder / f"{name}.{TOKENIZER}").read_bytes(), processor)


def test_coefficients_and_codes_are_the_references(case):
    config, io, codec = case
    np.testing.assert_array_equal(quantize(io["actions"], config["scale"]), io["quantised"])
    assert codec.encode(io["actions"]) == [[code for code in row if code >= 0] for row in io["ids"].tolist()]
    assert (codec.num_codes, codec.max_token) == (config["vocab_used"], config["max_coeff"])


def test_what_the_reference_decodes_is_equal_and_the_rest_is_known(case):
    config, io, codec = case
    shape = config["horizon"], config["action_dim"]
    for strings, kind in ((codec.encode(io["actions"]), "decode"), (config["bad_sequences"], "bad")):
        decoded, valid = codec.decode(strings, *shape)
        np.testing.assert_array_equal(valid, io[f"{kind}_ok"])
        reference = io["decoded" if kind == "decode" else "bad_decoded"]
        np.testing.assert_allclose(decoded[valid], reference[valid], atol=1e-6)


def test_ids_in_paligemmas_vocabulary_are_the_references(case):
    config = json.loads((next(fixtures_root().glob("fast_codec*")) / "config.json").read_text())["paligemma"]
    tokenizer = Tokenizer.train(["fold the towel"], 512)
    for name in ("openpi", "pi052"):
        skip = config[f"skip_{name}"]
        tokens = ActionTokens(case[2], Fast(skip=skip), tokenizer, config["vocab"])
        for code, ids in config["examples"].items():
            assert tokens.ids([int(code)])[-3] == ids[f"skip{skip}"]


def test_broken_strings_have_the_references_coefficients(case):
    config, _, codec = case
    for string, expected in zip(config["bad_sequences"], config["bad_coeffs"], strict=True):
        content = b"".join(bytes(codec.code_bytes[code, : codec.num_bytes[code]]) for code in string)
        values, _ = bytes_to_values(np.frombuffer(content, np.uint8))
        assert (values + codec.min_token).tolist() == expected


def test_a_fit_with_the_references_alphabet_is_the_references(case):
    config, io, codec = case
    values = quantize(io["fit_actions"], config["scale"])
    alphabet = [chr(value) for value in range(int(np.ptp(values)) + 1)]
    bpe = train_bpe(to_text(values - values.min()), config["vocab_size"], alphabet)
    assert json.loads(bpe.to_str())["model"] == json.loads(codec.tokenizer)["model"]
    ours = FastCodec.fit([io["fit_actions"]], config["vocab_size"], config["scale"])
    shape = config["horizon"], config["action_dim"]
    inside = np.abs(io["quantised"]).max((1, 2)) <= min(-ours.min_token, ours.max_token)
    decoded, valid = ours.decode(ours.encode(io["actions"][inside]), *shape)
    assert valid.all()  # the reference's loses a byte of one of them
    kept = io["decode_ok"][inside]
    np.testing.assert_allclose(decoded[kept], io["decoded"][inside][kept], atol=1e-6)
