import json
import warnings

import numpy as np
import PIL.Image
import pytest

from pi0_jax.data.robots import get_robot
from pi0_jax.inference.files import format_chunk, load_observation, plot_chunk, save_observation


@pytest.fixture
def observation():
    example = get_robot("tabletop").example()
    example["images"]["top"][3, 4] = 200
    return example | {"state": np.arange(6, dtype=np.float32)}


def check_equal(a, b):
    assert set(a["images"]) == set(b["images"])
    for name in a["images"]:
        np.testing.assert_array_equal(a["images"][name], b["images"][name])
    np.testing.assert_array_equal(a["state"], b["state"])
    assert str(a["prompt"]) == str(b["prompt"])


def test_npz_reads_back(tmp_path, observation):
    save_observation(tmp_path / "o.npz", observation)
    check_equal(load_observation(tmp_path / "o.npz"), observation)


def test_json_names_pictures_beside_it(tmp_path, observation):
    for name, image in observation["images"].items():
        PIL.Image.fromarray(image).save(tmp_path / f"{name}.png")
    content = {"images": {n: f"{n}.png" for n in observation["images"]}, "state": observation["state"].tolist()}
    (tmp_path / "o.json").write_text(json.dumps(content | {"prompt": observation["prompt"]}))
    check_equal(load_observation(tmp_path / "o.json"), observation)


def test_unreadable_files_are_refused_with_the_format(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no observation .*Expected an \.npz"):
        load_observation(tmp_path / "none.npz")
    for name, content in (("a.npz", b"PK not a zip"), ("a.json", b"{"), ("a.txt", b""), ("b.json", b"[1]")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=r"Expected an \.npz"):
            load_observation(tmp_path / name)
    (tmp_path / "c.json").write_text('{"images": {"top": "top.png"}}')
    with pytest.raises(FileNotFoundError, match=r"'top.png' for camera 'top'"):
        load_observation(tmp_path / "c.json")
    (tmp_path / "top.png").write_text("no picture")
    with pytest.raises(ValueError, match="not a picture"):
        load_observation(tmp_path / "c.json")


def test_a_chunk_prints_and_plots(tmp_path):
    chunk = np.arange(6.0).reshape(2, 3)
    text = format_chunk(chunk, ("dx", "dy", "dz"))
    assert text.splitlines()[0].split() == ["step", "dx", "dy", "dz"]
    assert text.splitlines()[2].split() == ["2", "3.0000", "4.0000", "5.0000"]
    plot_chunk(chunk, ("dx", "dy", "dz"), tmp_path / "chunk.png", "reach")
    assert PIL.Image.open(tmp_path / "chunk.png").size[0] > 300


def test_a_plot_has_room_for_the_names_of_many_dimensions(tmp_path):
    names = tuple(f"left_arm_waist_joint_{i}" for i in range(14))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib's, where a legend leaves the axes no room
        plot_chunk(np.zeros((2, 14)), names, tmp_path / "chunk.png", "reach")
