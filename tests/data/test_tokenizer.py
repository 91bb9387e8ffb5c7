"""Prompts as tokens: the two formats, a small model trained on the instructions, and clear refusals."""

import pickle
import warnings

import numpy as np
import pytest
import sentencepiece

from pi0_jax.data.tokenizer import Tokenizer, discretize
from pi0_jax.errors import UserError

TEXTS = ["reach the red block", "push the blue ball to the goal", "push the green puck to the goal"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS, 512)


@pytest.fixture(scope="module")
def processor(tokenizer):
    return sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)


def decode(processor, ids, mask):
    return processor.decode(ids[mask].tolist())


def test_training_is_deterministic_and_blind_to_order_and_repetition(tokenizer):
    assert Tokenizer.train([*reversed(TEXTS), TEXTS[0]], 512).model == tokenizer.model


def test_special_ids_are_gemmas(processor, tokenizer):
    assert [processor.pad_id(), processor.eos_id(), processor.bos_id(), processor.unk_id()] == [0, 1, 2, 3]
    assert tokenizer.vocab_size <= 512


def test_pi0_prompt_is_bos_text_newline_then_padding(tokenizer, processor):
    ids, mask = tokenizer.encode_prompt(" reach_the\nred block ", 16)
    expected = [2, *processor.encode("reach the red block"), *processor.encode("\n")]
    assert ids[: len(expected)].tolist() == expected
    assert not ids[len(expected) :].any()
    np.testing.assert_array_equal(mask, np.arange(16) < len(expected))
    assert ids.dtype == np.int32
    assert mask.dtype == bool


def test_pi05_prompt_holds_the_discretised_state(tokenizer, processor):
    state = np.array([-1.0, 0.0, 0.999, 7.0, -1.5])
    ids, mask = tokenizer.encode_prompt("push_the blue ball", 64, state)
    assert ids[0] == 2
    assert decode(processor, ids, mask) == "Task: push the blue ball, State: 0 128 255 255 -1;\nAction: "


def test_golden_tokens_of_both_formats():
    """Ids of a model trained here: they change if the prompt formats, the cleaning or the bins do."""
    tokenizer = Tokenizer.train(["pick up the fork"], 512)
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)

    def pieces(ids, mask):
        return [processor.id_to_piece(i) for i in ids[mask].tolist()]

    plain, mask = tokenizer.encode_prompt(" pick_up the fork\n", 16)
    assert pieces(plain, mask) == ["<s>", *processor.encode("pick up the fork", out_type=str), "<0x0A>"]
    state = np.array([-1.0, -1.2, 0.0, 0.5, 1.0, 1.7])  # six dimensions, which is all: none of the padding is written
    ids, mask = tokenizer.encode_prompt("pick up the fork", 80, state)
    text = "Task: pick up the fork, State: 0 -1 128 192 255 255;\nAction: "
    assert ids[mask].tolist() == [processor.bos_id(), *processor.encode(text)]
    assert mask.sum() == len(processor.encode(text)) + 1
    assert not ids[~mask].any()


def test_a_pickled_tokenizer_gives_the_same_ids(tokenizer):
    again = pickle.loads(pickle.dumps(tokenizer))
    np.testing.assert_array_equal(again.encode_prompt(TEXTS[0], 16)[0], tokenizer.encode_prompt(TEXTS[0], 16)[0])


def test_state_bins_divide_minus_one_to_one_in_256():
    edges = np.linspace(-1, 1, 257)
    np.testing.assert_array_equal(discretize(edges[:-1]), np.arange(256))
    np.testing.assert_array_equal(discretize(edges[1:] - 1e-9), np.arange(256))
    np.testing.assert_array_equal(discretize(np.array([[-1.1, 1.0]])), [[-1, 255]])


@pytest.mark.parametrize("text", ["unseen words: grüne Scheibe → 目標", "digits 0123456789", "  two  spaces", "\t"])
def test_any_text_is_encoded_without_unknown_tokens_and_comes_back(processor, text):
    ids = processor.encode(text)
    assert 3 not in ids
    assert processor.decode(ids) == text


def test_each_digit_is_one_token(processor):
    digits = processor.encode("0123456789")
    assert len(set(digits)) == 10
    for number in ("17", "255", "2025"):
        assert processor.encode(number) == [digits[int(digit)] for digit in number]


def test_known_instructions_take_few_tokens(tokenizer):
    assert max(tokenizer.encode_prompt(text, 32)[1].sum() for text in TEXTS) <= 10


def test_prompt_that_is_too_long_loses_its_end_with_one_warning():
    tokenizer = Tokenizer.train(TEXTS, 512)
    whole, _ = tokenizer.encode_prompt(TEXTS[1], 32)
    with pytest.warns(UserWarning, match="cut to 4"):
        ids, mask = tokenizer.encode_prompt(TEXTS[1], 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer.encode_prompt(TEXTS[2], 4)
    np.testing.assert_array_equal(ids, whole[:4])
    assert mask.all()


def test_prompt_that_fits_gives_no_warning(tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer.encode_prompt(TEXTS[0], 16)


def test_model_survives_a_file(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(tokenizer.model)
    again = Tokenizer.from_file(path)
    np.testing.assert_array_equal(again.encode_prompt(TEXTS[0], 16)[0], tokenizer.encode_prompt(TEXTS[0], 16)[0])
    assert again.model == tokenizer.model


def test_missing_and_foreign_files_are_refused_with_the_way_out(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"leave `data\.tokenizer` at None"):
        Tokenizer.from_file(tmp_path / "nothing.model")
    for content in (b'{"model": {"type": "BPE"}}', b""):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"tokenizer\.json is not a SentencePiece model"):
            Tokenizer.from_file(tmp_path / "tokenizer.json")


def test_training_without_text_or_room_is_refused():
    with pytest.raises(ValueError, match="no instruction"):
        Tokenizer.train(["", " "], 512)
    with pytest.raises(ValueError, match="try 512"):
        Tokenizer.train(TEXTS, 100)


def test_a_long_pi05_prompt_loses_words_of_the_task_and_never_the_state(processor):
    tokenizer = Tokenizer.train(TEXTS, 512)  # one that has not warned yet
    state = np.linspace(-1, 1, 6)
    with pytest.warns(UserWarning, match="was cut to 48"):
        ids, mask = tokenizer.encode_prompt("push the blue ball to the goal " * 5, 48, state)
    text = decode(processor, ids, mask)
    assert text.startswith("Task: push the blue")
    assert text.endswith(f", State: {' '.join(map(str, discretize(state)))};\nAction: ")


def test_a_state_that_does_not_fit_by_itself_is_refused():
    with pytest.warns(UserWarning, match="was cut"), pytest.raises(UserError, match="the state alone takes"):
        Tokenizer.train(TEXTS, 512).encode_prompt("push", 8, np.zeros(6))
