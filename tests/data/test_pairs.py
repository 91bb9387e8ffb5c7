"""Image-text pairs: read from a folder, mixed with demonstrations by weight, without actions."""

import dataclasses
import json
import pickle

import numpy as np
import PIL.Image
import pytest

from pi0_jax.config import DataConfig, DatasetConfig, Joint
from pi0_jax.data import loader as loading
from pi0_jax.data.mixture import open_datasets
from pi0_jax.data.normalization import Normalization
from pi0_jax.data.pairs import IMAGE, Box, PairsDataset, locations
from pi0_jax.data.robots import get_robot
from pi0_jax.data.source import text_of
from pi0_jax.data.targets import target_transform
from pi0_jax.data.tokenizer import Tokenizer
from pi0_jax.data.tools.stats import compute_normalizations
from pi0_jax.data.transform import make_pairs_transform, make_transform
from pi0_jax.errors import UserError

ROBOT = get_robot("tabletop")
LINES = (
    {"image": "a/wide.png", "question": "where is the ball?", "answer": "left"},
    {"image": "tall.png", "question": "detect ball", "boxes": [{"label": "ball", "box": [0, 10, 20, 40]}]},
    {"image": "a/wide.png", "question": "caption en", "answer": "a table"},
)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "pairs"
    (root / "a").mkdir(parents=True)
    PIL.Image.fromarray(np.full((30, 60, 3), 200, np.uint8)).save(root / "a" / "wide.png")
    PIL.Image.fromarray(np.full((40, 20), 90, np.uint8)).save(root / "tall.png")  # grey
    write(root, LINES)
    return root


def write(root, lines):
    (root / "all.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")


def test_a_line_is_an_episode_of_one_frame_without_actions(folder):
    pairs = pickle.loads(pickle.dumps(PairsDataset(folder, ROBOT, 24)))
    assert (pairs.num_episodes, pairs.num_frames, pairs.has_actions, pairs.has_boxes) == (3, 3, False, True)
    assert [pairs.task(i) for i in range(3)] == [line["question"] for line in LINES]
    assert [text_of(pairs.task(i)) for i in range(3)] == [
        "left",
        "<loc0256><loc0256><loc1023><loc0767> ball",
        "a table",
    ]
    images = pairs.images(IMAGE, np.array([1, 0]))
    assert images.shape == (2, 24, 24, 3)
    assert (images[0, :, 6:18] == 90).all()  # the narrow picture, with bars beside it
    assert not images[0, :, :6].any()
    assert (images[1, 6:18] == 200).all()
    assert not pairs.columns("action").any()
    assert pairs.columns("observation.state").shape == (3, 6)


def test_places_are_those_in_the_square_that_the_model_sees():
    whole, beyond = Box("a", 0.0, 0.0, 200.0, 100.0), Box("b", -50.0, 50.0, 100.0, 900.0)
    assert locations([whole], 200, 100) == "<loc0256><loc0000><loc0767><loc1023> a"
    assert locations([beyond, whole], 100, 100) == (
        "<loc0512><loc0000><loc1023><loc1023> b ; <loc0000><loc0000><loc1023><loc1023> a"
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": "tall.png", "question": "where?"}', "either an answer or boxes"),
        ('{"image": "tall.png", "question": " ", "answer": "there"}', "needs a question"),
        ('{"image": "tall.png", "question": "where?", "anwser": "there"}', "Did you mean 'answer'"),
        ('{"image": "tall.png", "question": "a", "boxes": [{"label": "b", "box": [9, 1, 2, 3]}]}', "box of 'b' is"),
        ('{"image": "tall.png", "question": "a", "boxes": [{"label": "b", "box": [9]}]}', "TypeError"),
        ('{"question": "where?", "answer": "there"}', "KeyError"),
        ("[1]", "is no pair such as"),
        ("{", "Expecting"),
    ],
)
def test_a_line_that_is_none_is_named(folder, line, message):
    (folder / "more.jsonl").write_text(json.dumps(LINES[0]) + "\n" + line + "\n")
    with pytest.raises(UserError, match=rf"line 2 of .*more\.jsonl.*{message}"):
        PairsDataset(folder, ROBOT, 24)


def test_pictures_that_are_missing_or_broken_are_named(folder):
    (folder / "tall.png").write_bytes(b"nothing")
    write(folder, [LINES[0], {"image": "tall.png", "question": "what?", "answer": "a ball"}])
    with pytest.raises(UserError, match=r"tall\.png cannot be read as a picture"):
        PairsDataset(folder, ROBOT, 24).images(IMAGE, np.array([1]))
    (folder / "tall.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 pictures .* are missing: .*tall\.png"):
        PairsDataset(folder, ROBOT, 24)


def test_pairs_and_demonstrations_are_one_stream(folder, dataset, config):
    model = dataclasses.replace(config.policy.model, variant="pi05", prompt_length=120)
    policy = dataclasses.replace(config.policy, model=model, objective=Joint(codec=None, text_tokens=60))
    data = DataConfig(datasets=(DatasetConfig(str(dataset.root), 0.5), DatasetConfig(str(folder), 0.5)))
    config = dataclasses.replace(config, policy=policy, data=data, batch_size=16)
    datasets = open_datasets(data, policy)
    robot, pairs = datasets
    assert pairs.cameras == {IMAGE: "top"}
    groups = compute_normalizations(datasets, 4)
    assert list(groups) == ["tabletop"]
    alone = compute_normalizations(datasets[:1], 4)
    np.testing.assert_array_equal(groups["tabletop"].stats["state"].mean, alone["tabletop"].stats["state"].mean)
    texts = [*robot.source.tasks, *pairs.source.tasks]
    tokenizer = Tokenizer.train([*texts, *map(text_of, texts)], 512)
    targets = target_transform(policy, tokenizer, None, texts)
    normalization = Normalization(groups["tabletop"].stats, robot.semantics)
    transforms = (
        make_transform(policy, robot.robot, normalization, tokenizer, targets),
        make_pairs_transform(policy, robot.robot, tokenizer, targets),
    )
    batch = next(loading.make_loader(list(zip(datasets, transforms, strict=True)), config))
    there = batch.has_actions
    assert 0 < there.sum() < 16
    assert not batch.step_mask[~there].any()
    assert not batch.actions[~there].any()
    assert batch.targets.mask[~there].any(1).all()
    assert not batch.targets.mask[there].any()
    assert not batch.targets.is_action.any()
    assert not batch.observation.image_masks["tool"][~there].any()
    assert batch.observation.image_masks["top"].all()
    decode = tokenizer._processor.decode
    answers = {line["question"]: text_of(task) for line, task in zip(LINES, pairs.source.tasks, strict=True)}
    for row in np.flatnonzero(~there):
        prompt = decode(batch.observation.prompt[row][batch.observation.prompt_mask[row]].tolist())
        assert decode(batch.targets.tokens[row][batch.targets.mask[row]].tolist()) == answers[prompt.rstrip("\n")]


def test_pairs_alone_are_refused(folder, config):
    with pytest.raises(UserError, match="all datasets are image-text pairs"):
        open_datasets(DataConfig(str(folder)), config.policy)
