"""Policies that act by action tokens, from a checkpoint to actions."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from pi0_jax.config import Autoregressive, Fast, Joint
from pi0_jax.data.fast import FastCodec
from pi0_jax.diagnose.inside import attention
from pi0_jax.inference.policy import Policy
from pi0_jax.inference.shapes import prompt_lengths
from pi0_jax.model.writer import Block
from pi0_jax.sampler import Categorical, Euler, Greedy
from pi0_jax.serving.backend import Session
from pi0_jax.serving.robot_policy import RobotPolicy
from tests.conftest import tiny_config
from tests.policies import TINY, save_tiny_checkpoint

MODEL = tiny_config("pi0_fast", depth=1, action_dim=8, vocab_size=1024, prompt_length=64)
FAST = dataclasses.replace(
    TINY,
    model=MODEL,
    objective=Autoregressive(codec=Fast(skip=5, max_tokens=30)),
    sampler=Greedy(),
    normalization="quantile",
)


@pytest.fixture(scope="module")
def codec() -> FastCodec:
    pytest.importorskip("tokenizers")
    chunks = np.random.default_rng(0).uniform(-1, 1, (100, MODEL.action_horizon, 3))
    return FastCodec.fit([np.cumsum(chunks, axis=1) / 3], 300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, codec):
    return save_tiny_checkpoint(tmp_path_factory.mktemp("fast"), policy=FAST, codec=codec.files())


def test_a_policy_of_action_tokens_acts(folder, codec):
    policy = Policy.load(folder)
    observation: Any = policy.robot.example()
    actions = policy.infer(observation)
    assert actions.shape == (MODEL.action_horizon, 3)
    assert np.isfinite(actions).all()
    np.testing.assert_array_equal(policy.infer(observation, seed=1), actions)
    # What another one in the batch writes, and how long, changes nothing.
    other: Any = observation | {"images": {name: 255 - x for name, x in observation["images"].items()}}
    both = policy.infer_batch([other, observation], jax.random.split(jax.random.key(0), 2))
    np.testing.assert_allclose(both[1], actions, atol=1e-6)
    drawn = [policy.infer(observation, seed=seed, sampler=Categorical(temperature=2.0)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert np.abs(drawn[2] - drawn[0]).max() > 1e-3
    free = policy.infer(observation, sampler=Greedy(constrained=False))
    assert np.isfinite(free).all()
    like = policy.infer(observation, sampler=Greedy(constrained=False, like="openpi"))
    assert np.isfinite(like).all()
    with pytest.raises(ValueError, match="'openpi' is for unconstrained decoding"):
        Greedy(like="openpi")
    with pytest.raises(ValueError, match="no number of steps to choose"):
        policy.infer(observation, num_steps=3)


def test_a_policy_without_the_codec_of_its_chunks_is_refused(tmp_path, codec):
    save_tiny_checkpoint(tmp_path / "none", policy=FAST)
    with pytest.raises(ValueError, match="holds no codec"):
        Policy.load(tmp_path / "none")
    longer = dataclasses.replace(FAST, model=dataclasses.replace(MODEL, action_horizon=9))
    save_tiny_checkpoint(tmp_path / "longer", policy=longer, codec=codec.files())
    with pytest.raises(ValueError, match="fitted to chunks of 6 actions"):
        Policy.load(tmp_path / "longer")


JOINT = dataclasses.replace(
    TINY,
    model=tiny_config("pi05", depth=1, action_dim=8, vocab_size=1024, prompt_length=64),
    objective=Joint(codec=None, text_tokens=4),
    sampler=Euler(2),
    normalization="quantile",
    subtask_every=2,
)


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    return Policy.load(save_tiny_checkpoint(tmp_path_factory.mktemp("joint"), policy=JOINT))


def test_a_subtask_is_written_and_acted_by(writer):
    observation, keys = writer.robot.example(), jax.random.split(jax.random.key(0), 3)
    given: Any = observation | {"subtask": "reach the red block"}
    none: Any = observation | {"subtask": ""}
    actions, texts = writer.answer_batch([observation, given, none], keys)
    assert texts[1:] == ["reach the red block", ""]
    assert texts[0] is not None
    # Each answer is the one it gets alone; what was written and is given again leads to the same actions.
    for row, raw in enumerate((observation, given, none)):
        np.testing.assert_allclose(writer.infer_batch([raw], keys[row : row + 1])[0], actions[row], atol=1e-5)
    assert np.abs(actions[1] - writer.infer_batch([none], keys[1:2])[0]).max() > 1e-4
    assert writer.compiled == 3  # alone and in a batch of two, given or none; and written


def test_its_chunks_for_normalised_observations_are_by_subtasks_too(writer, monkeypatch):
    written = np.zeros((1, 6, 8), np.float32)
    monkeypatch.setattr(writer.sampler, "write", lambda inputs, sampler: (written, None))
    observation = writer.program(1, 64)[2]
    assert writer.sample(observation, jax.random.split(jax.random.key(0), 1), written)[0] is written


def test_a_diagnosis_sees_attention_to_the_subtask_that_was_written(writer, monkeypatch):
    words = np.array(writer.tokenizer.encode("reach the block")[:3])
    texts = iter([(words, 3), (words, 1), (words, 0)])

    def write(inputs, sampler):
        tokens, length = next(texts)
        text = Block(np.pad(tokens, (0, 1))[None], np.arange(4)[None] < length)
        return np.zeros((1, 6, 8), np.float32), text

    monkeypatch.setattr(writer.sampler, "write", write)
    observation = jax.tree.map(lambda x: np.repeat(x, 3, axis=0), writer.program(1, 64)[2])
    seen = attention(writer, observation, np.zeros((3, 6, 8), np.float32), batch_size=1)
    assert seen.written == [writer.tokenizer.decode(words[:n].tolist()) for n in (3, 1, 0)]
    assert seen.subtask[0] > seen.subtask[1] > seen.subtask[2] == 0
    cameras = sum(x.sum((1, 2)) for x in seen.cameras.values())
    np.testing.assert_allclose(cameras + seen.prompt + seen.subtask + seen.own, 1, atol=1e-5)


@pytest.mark.parametrize(("every", "found"), [(2, [True, False]), (0, [False, False])])
def test_what_a_subtask_of_a_request_takes_is_compiled_before(writer, every, found, monkeypatch):
    """With `subtask_every` 0, too: a request may bring one."""
    calls = []
    monkeypatch.setattr(writer, "config", dataclasses.replace(writer.config, subtask_every=every))
    monkeypatch.setattr(writer, "_batch_sizes", ())
    monkeypatch.setattr("pi0_jax.inference.policy.warm_up", lambda sampler, how, found: calls.extend(found) or {})
    writer.warm_up((1,))
    kinds = [(call.write, call.inputs.text is not None) for call in calls]
    assert kinds == [(found[0], False), (False, True)] * len(prompt_lengths(64))


def test_sessions_hold_a_subtask_for_some_chunks(writer, monkeypatch):
    written = iter(["first", "second"])

    def answer(observations, keys):
        texts = [raw["subtask"] if "subtask" in raw else next(written) for raw in observations]
        return np.zeros((len(observations), 6, 3)), texts

    monkeypatch.setattr(writer, "answer_batch", answer)
    served, session = RobotPolicy(writer, (1,)), Session("robot")
    request = served.validate(writer.robot.example())
    found = [served.infer_batch([request], [session])[0]["subtask"] for _ in range(4)]
    assert found == ["first", "first", "second", "second"]
    session.reset()
    assert session.subtask is None
    fixed = served.validate(writer.robot.example() | {"subtask": "third"})
    assert served.infer_batch([fixed], [session])[0]["subtask"] == "third"


def test_a_policy_that_reads_no_subtask_refuses_one(folder):
    policy = Policy.load(folder)
    given: Any = policy.robot.example() | {"subtask": "x"}
    for ask in (policy.infer, RobotPolicy(policy, (1,)).validate):  # which is the client's fault
        with pytest.raises(ValueError, match="this policy reads none"):
            ask(given)
    with pytest.raises(ValueError, match="writes no text: take Joint"):
        Policy.load(folder, subtask_every=2)
