"""Orbax's format on disk: Orbax reads what we write, and we read what Orbax writes, compressed or not."""

import json
import tracemalloc

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax.traverse_util import unflatten_dict

from pi0_jax.convert import lazy, orbax_format
from pi0_jax.convert.lazy import in_memory
from pi0_jax.convert.orbax_format import open_orbax, write_orbax
from tests.convert.test_lazy import ARRAYS, as_tensors, assert_same


@pytest.mark.parametrize("piece", [16, 2**26])
def test_orbax_reads_what_we_write(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(lazy, "PIECE_BYTES", piece)
    write_orbax(tmp_path / "ours", as_tensors())
    assert_same(open_orbax(tmp_path / "ours"))
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(tmp_path / "ours").item_metadata.tree
        arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        loaded = checkpointer.restore(tmp_path / "ours", restore_args=arguments)["params"]
    for path, array in ARRAYS.items():
        leaf = loaded
        for key in path.split("/"):
            leaf = leaf[key]
        assert leaf.dtype == array.dtype
        assert np.array_equal(leaf, array)


@pytest.mark.parametrize("ocdbt", [True, False])
@pytest.mark.parametrize("zarr3", [True, False])
@pytest.mark.parametrize("compressed", [True, False])
def test_we_read_what_orbax_writes(tmp_path, ocdbt, zarr3, compressed):
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3, use_compression=compressed)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(tmp_path / "theirs", {"params": unflatten_dict(ARRAYS, sep="/")})
    assert_same(open_orbax(tmp_path / "theirs"))


def test_rows_of_one_chunk_are_unpacked_in_any_order(tmp_path):
    array = np.random.default_rng(0).normal(size=(5, 3, 40)).astype(np.float32)
    write_orbax(tmp_path / "x", as_tensors({"a": array, "b": 2 * array}))
    found = open_orbax(tmp_path / "x")
    for i in (0, 0, 1, 2, 4, 4, 3, 0):
        assert np.array_equal(found["a"].read(i), array[i])
        assert np.array_equal(found["b"].read(i), 2 * array[i])
    assert np.array_equal(found["a"].read(None), array)
    assert np.array_equal(found["a"].read(2), array[2])


def test_rows_of_one_chunk_do_not_take_the_memory_of_the_chunk(tmp_path):
    array = np.random.default_rng(0).integers(0, 2**16, (64, 2**18), np.uint16).view(np.float16)
    write_orbax(tmp_path / "x", as_tensors({"a": array}))
    (tensor,) = open_orbax(tmp_path / "x").values()
    tracemalloc.start()
    for i in range(len(array)):
        assert tensor.read(i).tobytes() == array[i].tobytes()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # A range of the packed data and three rows; numpy's and Python's bytes are what tracemalloc sees.
    assert peak < 2 * orbax_format._RANGE_BYTES + 3 * array[0].nbytes


def test_a_damaged_chunk_is_named(tmp_path):
    array = np.random.default_rng(0).normal(size=(64, 4096)).astype(np.float32)
    write_orbax(tmp_path / "x", as_tensors({"a": array}))
    largest = max((p for p in (tmp_path / "x").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    start = content.find(b"\x28\xb5\x2f\xfd")  # of a zstd frame
    content[start : start + 4] = b"\0\0\0\0"
    largest.write_bytes(content)
    with pytest.raises(ValueError, match="'a' cannot be read"):
        open_orbax(tmp_path / "x")["a"].read(0)


def test_trailing_value_is_cut_only_where_all_paths_have_it(tmp_path):
    for names, expected in ((("a/value", "b/value"), {"a", "b"}), (("a/value", "b"), {"a/value", "b"})):
        write_orbax(tmp_path / names[1].replace("/", "_"), {n: in_memory(np.ones(2, np.float32)) for n in names})
        assert set(open_orbax(tmp_path / names[1].replace("/", "_"))) == expected


def test_an_array_that_orbax_lost_is_named(tmp_path):
    write_orbax(tmp_path / "x", as_tensors())
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
