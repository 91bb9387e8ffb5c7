"""What is learnt as tokens: text, then action tokens, with masks; what does not fit is counted or refused."""

import dataclasses
import pickle

import numpy as np
import pytest

from pi0_jax.config import Autoregressive, Fast, Joint
from pi0_jax.data.fast import FastCodec, to_text, train_bpe
from pi0_jax.data.normalization import Normalization
from pi0_jax.data.robots import get_robot
from pi0_jax.data.source import Instruction, Wrapped
from pi0_jax.data.targets import ActionTokens, check_shape, target_transform, write_targets
from pi0_jax.data.tokenizer import Tokenizer
from pi0_jax.data.transform import make_transform
from pi0_jax.errors import UserError
from tests.data.stats import compute_stats
from tests.data.test_loader import ABSOLUTE, make_loader

pytest.importorskip("tokenizers")
TEXTS = ("reach the red block", "push the blue ball", "reach the puck", "grip it", "go there")
VOCAB = 1024


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS, 512)


@pytest.fixture(scope="module")
def codec():
    return FastCodec.fit([np.random.default_rng(0).normal(size=(200, 4, 3)).cumsum(1)], 300)


def sample(rows: int = 2, **more):
    actions = np.random.default_rng(1).normal(size=(rows, 4, 3)).cumsum(1)
    return {"state": np.zeros((rows, 6)), "actions": actions, **more}


def read(tokenizer, ids):
    """Text of ids, and codes in the place of action tokens of a vocabulary without a skip."""
    return tokenizer._processor.decode([i for i in ids if i < tokenizer.vocab_size])


@pytest.mark.parametrize("bos", [False, True])
def test_action_tokens_are_marker_codes_bar_and_end(tokenizer, codec, bos):
    tokens = ActionTokens(codec, Fast(skip=5, max_tokens=60, bos=bos), tokenizer, VOCAB, TEXTS)
    example = sample()
    targets = write_targets(tokenizer, tokens, 0).forward(example)["targets"]
    for row, codes in enumerate(codec.encode(example["actions"])):
        ids = targets.tokens[row][targets.mask[row]].tolist()
        begin = [2] * bos + tokenizer.encode("Action: ")
        assert ids == [*begin, *(VOCAB - 6 - code for code in codes), *tokenizer.encode("|"), 1]
        assert targets.tokens[row, len(ids) :].tolist() == [0] * (60 - len(ids))
    np.testing.assert_array_equal(targets.is_action, targets.mask)
    np.testing.assert_array_equal(targets.loss_mask, targets.mask & (np.arange(60) >= bos))


def test_codes_of_a_table_of_their_own_come_after_a_marker_that_is_given(tokenizer, codec):
    tokens = ActionTokens(codec, Fast(own_table=400, max_tokens=60), tokenizer, VOCAB, TEXTS)
    example, marker = sample(1), tokenizer.encode("Action: ")
    targets = write_targets(tokenizer, tokens, 0).forward(example)["targets"]
    (codes,) = codec.encode(example["actions"])
    assert targets.tokens[0][targets.mask[0]].tolist() == [*marker, *(VOCAB + code for code in codes)]
    np.testing.assert_array_equal(targets.loss_mask, targets.mask & (np.arange(60) >= len(marker)))
    with pytest.raises(UserError, match=f"has {codec.num_codes} codes, and codec.own_table 20: take as many"):
        ActionTokens(codec, Fast(own_table=20), tokenizer, VOCAB)
    with pytest.raises(UserError, match=r"codec\.max_tokens is 3, and marker and end take"):
        ActionTokens(codec, Fast(max_tokens=3), tokenizer, VOCAB)


def test_text_comes_first_and_the_flow_may_see_it(tokenizer, codec):
    tokens = ActionTokens(codec, Fast(skip=5, max_tokens=60), tokenizer, VOCAB, TEXTS)
    transform = pickle.loads(pickle.dumps(tokens)), write_targets(tokenizer, tokens, 20)
    text = np.array([" grip it ", ""], object)
    targets = transform[1].forward(sample(text=text))["targets"]
    alone = transform[1].forward(sample())["targets"]
    words = [*tokenizer.encode("grip it"), 1]
    count = len(words)
    assert targets.tokens.shape == (2, 80)
    assert targets.tokens[0, :count].tolist() == words
    assert not targets.is_action[0, :count].any()
    assert targets.loss_mask[0, :count].all()
    np.testing.assert_array_equal(targets.tokens[0, count:], alone.tokens[0, : 80 - count])
    np.testing.assert_array_equal(targets.is_action[0, count:], alone.is_action[0, : 80 - count])
    jointly = (np.concatenate([a[1], b[1]]) for a, b in zip(targets, alone, strict=True))
    assert all((each[:80] == each[80:]).all() for each in jointly)
    single = {key: value[0] for key, value in sample(text=text).items()}
    one = transform[1].forward(single)["targets"]
    assert all((a == b[0]).all() for a, b in zip(one, targets, strict=True))


def test_what_has_no_room_is_cut_and_counted(tokenizer, codec, caplog):
    room = len(tokenizer.encode("Action: ")) + 3
    tokens = ActionTokens(codec, Fast(skip=5, max_tokens=room), tokenizer, VOCAB, TEXTS)
    transform = write_targets(tokenizer, tokens, 4)
    targets = transform.forward(sample(11, text=np.full(11, "reach the red block")))["targets"]
    assert targets.mask.all()
    words = tokenizer.encode("reach the red block")
    assert targets.tokens[0, :4].tolist() == [*words[:3], 1]  # so that a policy learns to end in time
    assert targets.is_action[:, 4:].all()
    assert [message.split(".")[0] for message in caplog.messages] == [
        "1 of 1 texts were cut to 4 tokens",
        "10 of 10 texts were cut to 4 tokens",
        f"1 of 1 action chunks were cut to {room} tokens",
        f"10 of 10 action chunks were cut to {room} tokens",
    ]


def test_chunks_that_a_foreign_codec_cannot_write_whole_are_counted(tokenizer, caplog):
    bpe = train_bpe(to_text(np.full((5, 4, 3), 20)), 300, [chr(value) for value in range(41)])
    foreign = FastCodec(bpe.to_str().encode(), b'{"scale": 10, "min_token": -20}')
    tokens = ActionTokens(foreign, Fast(skip=5, max_tokens=60), tokenizer, VOCAB)
    write_targets(tokenizer, tokens, 0).forward(sample(1))
    assert "1 of 1 action chunks lack coefficients" in caplog.text


def test_codes_and_text_that_share_ids_are_refused(tokenizer, codec):
    with pytest.raises(UserError, match=r"which take the ids .* of a vocabulary of 512\. The texts"):
        ActionTokens(codec, Fast(skip=0), tokenizer, 512, TEXTS)
    with pytest.raises(UserError, match=f"Raise `model.vocab_size` to {tokenizer.vocab_size + codec.num_codes + 5}"):
        ActionTokens(codec, Fast(skip=5), tokenizer, 300, TEXTS)
    ActionTokens(codec, Fast(skip=5), tokenizer, tokenizer.vocab_size + codec.num_codes + 5, TEXTS)
    check_shape(codec, 4, 3, "tabletop")
    with pytest.raises(UserError, match="4 actions of 3 dimensions; those of tabletop have 8 of 3"):
        check_shape(codec, 8, 3, "tabletop")


def test_tables_say_what_a_program_needs(tokenizer, codec):
    tables = ActionTokens(codec, Fast(skip=5, bos=True), tokenizer, VOCAB).tables(3)
    assert tables.marker.tolist() == [2, *tokenizer.encode("Action: ")]
    assert [int(tables.bar), int(tables.eos), int(tables.dims)] == [*tokenizer.encode("|"), 1, 3]
    assert (int(tables.min_token), int(tables.max_token)) == (codec.min_token, codec.max_token)


def test_an_objective_that_writes_nothing_has_no_targets_and_refuses_text(tokenizer, codec, config):
    transform = target_transform(config.policy, tokenizer, None, TEXTS)
    assert "targets" not in transform.forward(sample())
    with pytest.raises(UserError, match=r"1 texts to be written, such as 'go there'.*Gaussian writes none: take Joint"):
        target_transform(config.policy, tokenizer, None, [*TEXTS, Instruction("reach", "go there")])


class Subtasks(Wrapped):
    """The dataset, whose first task has a text to be written."""

    def __init__(self, source):
        super().__init__(source)
        self.tasks = [Instruction(self.tasks[0], "go there"), *self.tasks[1:]]


@pytest.mark.parametrize(
    ("objective", "variant"),
    [
        (Autoregressive(codec=Fast(skip=5, max_tokens=60)), "pi0_fast"),
        (Joint(codec=Fast(skip=5, max_tokens=60)), "pi05"),
    ],
)
def test_batches_have_targets_of_what_the_flow_learns(dataset, config, codec, objective, variant):
    model = dataclasses.replace(config.policy.model, variant=variant, vocab_size=VOCAB, prompt_length=120)
    policy = dataclasses.replace(config.policy, model=model, objective=objective)
    config, source = dataclasses.replace(config, policy=policy), dataset
    source = Subtasks(dataset) if objective.text_tokens else dataset
    tokenizer = Tokenizer.train([*source.tasks, "go there"], 512)
    stats = compute_stats(dataset)
    targets = target_transform(policy, tokenizer, codec, source.tasks)
    transform = make_transform(policy, get_robot("tabletop"), Normalization(stats, ABSOLUTE), tokenizer, targets)
    batch = next(make_loader(source, transform, config))
    assert batch.targets.tokens.shape == (6, objective.text_tokens + 60)
    tokens = ActionTokens(codec, objective.codec, tokenizer, VOCAB)
    for row in range(6):
        ids = batch.targets.tokens[row][batch.targets.is_action[row]].tolist()
        codes = [tokens.first - token for token in ids if tokens.first - codec.num_codes < token]
        (decoded,), (valid,) = codec.decode([codes], 4, 3)
        steps = batch.step_mask[row]
        tolerance = 0.05 * 2 + (0 if valid else np.inf)
        np.testing.assert_allclose(decoded[steps], batch.actions[row, steps, :3], atol=tolerance)
        prompt = tokenizer._processor.decode(batch.observation.prompt[row][batch.observation.prompt_mask[row]].tolist())
        text = batch.targets.tokens[row][batch.targets.mask[row] & ~batch.targets.is_action[row]].tolist()
        assert prompt.startswith("Task: ")
        if variant == "pi0_fast":
            assert prompt.endswith(";\n")
        else:
            assert prompt.endswith("Subtask: " if text else "Action: ")
            assert tokenizer._processor.decode(text) == ("go there" if source.tasks[0] in prompt else "")
    acting = transform.forward({"images": {}, "state": np.zeros(6), "prompt": "Reach", "asks": variant == "pi05"})
    assert "targets" not in acting
    prompt = tokenizer._processor.decode(acting["prompt"][acting["prompt_mask"]].tolist())
    assert prompt.startswith("Task: Reach," if variant == "pi05" else "Task: reach,")
    assert prompt.endswith("Subtask: " if variant == "pi05" else ";\n")
