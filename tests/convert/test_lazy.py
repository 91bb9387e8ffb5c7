import json
import tracemalloc
import zipfile

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from flax.traverse_util import unflatten_dict

from pi0_jax.convert import lazy
from pi0_jax.convert.lazy import LazyArray, in_memory, open_npz, open_orbax, open_safetensors, read_all

ARRAYS = {
    "a/kernel": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "a/bias": np.linspace(-1, 1, 7).astype(ml_dtypes.bfloat16),
    "b": np.arange(6, dtype=np.float16).reshape(3, 2),
}


def as_tensors(arrays=ARRAYS) -> dict[str, LazyArray]:
    return {name: in_memory(array) for name, array in arrays.items()}


def assert_same(found: dict[str, LazyArray], arrays=ARRAYS):
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in found.items()} == {
        name: (array.shape, array.dtype) for name, array in arrays.items()
    }
    for name, array in arrays.items():
        assert np.array_equal(found[name].read(None), array)
        for i in range(len(array)):
            assert np.array_equal(found[name].read(i), array[i])


def test_safetensors_of_ours_are_the_librarys_and_the_other_way_round(tmp_path):
    lazy.write_safetensors(tmp_path / "ours.safetensors", as_tensors(), {"format": "pt"})
    assert_same(open_safetensors(tmp_path / "ours.safetensors"))
    loaded = safetensors.numpy.load_file(tmp_path / "ours.safetensors")
    assert all(np.array_equal(loaded[name].view(array.dtype), array) for name, array in ARRAYS.items())
    plain = {name: array for name, array in ARRAYS.items() if array.dtype != ml_dtypes.bfloat16}
    safetensors.numpy.save_file(plain, tmp_path / "theirs.safetensors")
    assert_same(open_safetensors(tmp_path / "theirs.safetensors"), plain)


def test_cut_safetensors_are_refused_with_the_tensor(tmp_path):
    path = tmp_path / "x.safetensors"
    lazy.write_safetensors(path, as_tensors())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="cut short at tensor 'b'"):
        open_safetensors(path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="no safetensors file"):
        open_safetensors(path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_give_back_what_was_saved_bfloat16_too(tmp_path, save):
    save(tmp_path / "x.npz", **ARRAYS)
    with zipfile.ZipFile(tmp_path / "x.npz") as archive:
        assert "a/bias.npy" in archive.namelist()
    assert np.load(tmp_path / "x.npz")["a/bias"].dtype == np.dtype("V2")  # numpy has forgotten bfloat16
    assert_same(open_npz(tmp_path / "x.npz"))


@pytest.mark.parametrize("piece", [16, 2**26])
def test_orbax_reads_what_is_written_and_the_other_way_round(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(lazy, "PIECE_BYTES", piece)
    lazy.write_orbax(tmp_path / "ours", as_tensors())
    assert_same(open_orbax(tmp_path / "ours"))
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(tmp_path / "ours").item_metadata.tree
        arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        loaded = checkpointer.restore(tmp_path / "ours", restore_args=arguments)["params"]
        checkpointer.save(tmp_path / "theirs", {"params": unflatten_dict(ARRAYS, sep="/")})
    assert np.array_equal(loaded["a"]["kernel"], ARRAYS["a/kernel"])
    assert np.array_equal(loaded["a"]["bias"], ARRAYS["a/bias"])
    assert_same(open_orbax(tmp_path / "theirs"))


def test_rows_of_one_chunk_are_unpacked_in_any_order(tmp_path):
    array = np.random.default_rng(0).normal(size=(5, 3, 40)).astype(np.float32)
    lazy.write_orbax(tmp_path / "x", as_tensors({"a": array, "b": 2 * array}), whole=True)
    found = open_orbax(tmp_path / "x")
    for i in (0, 0, 1, 2, 4, 4, 3, 0):
        assert np.array_equal(found["a"].read(i), array[i])
        assert np.array_equal(found["b"].read(i), 2 * array[i])
    assert np.array_equal(found["a"].read(None), array)
    assert np.array_equal(found["a"].read(2), array[2])


def test_rows_of_one_chunk_do_not_take_the_memory_of_the_chunk(tmp_path):
    array = np.random.default_rng(0).integers(0, 2**16, (64, 2**18), np.uint16).view(np.float16)
    lazy.write_orbax(tmp_path / "x", as_tensors({"a": array}), whole=True)
    (tensor,) = open_orbax(tmp_path / "x").values()
    tracemalloc.start()
    for i in range(len(array)):
        assert tensor.read(i).tobytes() == array[i].tobytes()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # A range of the packed data and three rows; numpy's and Python's bytes are what tracemalloc sees.
    assert peak < 2 * lazy._RANGE_BYTES + 3 * array[0].nbytes


def test_a_damaged_chunk_is_named(tmp_path):
    array = np.random.default_rng(0).normal(size=(64, 4096)).astype(np.float32)
    lazy.write_orbax(tmp_path / "x", as_tensors({"a": array}), whole=True)
    largest = max((p for p in (tmp_path / "x").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    start = content.find(b"\x28\xb5\x2f\xfd")  # of a zstd frame
    content[start : start + 4] = b"\0\0\0\0"
    largest.write_bytes(content)
    with pytest.raises(ValueError, match="'a' cannot be read"):
        open_orbax(tmp_path / "x")["a"].read(0)


def test_trailing_value_is_cut_only_where_all_paths_have_it(tmp_path):
    for names, expected in ((("a/value", "b/value"), {"a", "b"}), (("a/value", "b"), {"a/value", "b"})):
        lazy.write_orbax(tmp_path / names[1].replace("/", "_"), {n: in_memory(np.ones(2, np.float32)) for n in names})
        assert set(open_orbax(tmp_path / names[1].replace("/", "_"))) == expected


def test_an_array_that_orbax_lost_is_named(tmp_path):
    lazy.write_orbax(tmp_path / "x", as_tensors())
    metadata = json.loads((tmp_path / "x" / "_METADATA").read_text())
    entry = json.loads(json.dumps(metadata["tree_metadata"]["('params', 'b')"]))
    entry["key_metadata"][1]["key"] = "lost"
    metadata["tree_metadata"]["('params', 'lost')"] = entry
    (tmp_path / "x" / "_METADATA").write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match="lacks the array 'lost'"):
        open_orbax(tmp_path / "x")


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no whole checkpoint"):
        open_orbax(tmp_path)


def test_pieces_are_the_whole(monkeypatch):
    array = np.arange(30).reshape(5, 6)
    for rows in (1, 2, 5, 9):
        assert np.array_equal(np.concatenate([p for _, p in lazy.pieces(in_memory(array), rows)]), array)
    assert list(read_all({"x": in_memory(array)})) == ["x"]
