import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from pi0_jax.convert import lazy
from pi0_jax.convert.lazy import LazyArray, in_memory, open_npz, open_safetensors, read_all

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


def test_pieces_are_the_whole(monkeypatch):
    array = np.arange(30).reshape(5, 6)
    for rows in (1, 2, 5, 9):
        assert np.array_equal(np.concatenate([p for _, p in lazy.pieces(in_memory(array), rows)]), array)
    assert list(read_all({"x": in_memory(array)})) == ["x"]
