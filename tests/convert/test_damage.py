"""Any one tensor that is deleted, renamed, transposed or filled with NaN stops a conversion, with its name."""

import importlib
import json
import re
import shutil

import numpy as np
import pytest

from pi0_jax import cli
from pi0_jax.config import ExpertConfig
from pi0_jax.convert.assemble import foreign_tensors
from pi0_jax.convert.formats import Overrides, open_checkpoint, openpi, write_checkpoint
from pi0_jax.convert.lazy import (
    in_memory,
    open_npz,
    open_safetensors,
    read_all,
    write_safetensors,
)
from pi0_jax.convert.orbax_format import open_orbax, write_orbax
from pi0_jax.convert.run import convert
from tests.conftest import tiny_config
from tests.convert.common import save_tiny, tiny_weights, tiny_weights_of_head

OVERRIDES = Overrides(horizon=6, vision_heads=2, num_heads=4, num_kv_heads=1, lora_scale=2.0)
SPARE = ("lm_head.weight", "embed_tokens.weight")
"""Ends of names that may be absent in PyTorch: either of the tied pair, and the unused layer."""

SOURCES = [
    *[("pi0", name) for name in ("pi0", "pi05", "pi0_fast", "pi0_lora", "Compact")],
    *[("openpi", name) for name in ("pi0", "pi05", "pi0_fast", "pi0_lora")],
    *[(kind, name) for kind in ("openpi-torch", "lerobot") for name in ("pi0", "pi05", "pi0_fast")],
    ("big_vision", "pi0_fast"),
]


def source_of(kind, name, folder):
    """Writes a checkpoint of a format; its path, its tensors and the name of the function that opens them."""
    weights = tiny_weights_of_head(name) if name == "Compact" else tiny_weights(name)
    if kind == "big_vision":
        folder.mkdir()
        tensors = read_all(foreign_tensors(weights, "openpi", openpi.rules("pi0_fast")))
        np.savez(folder / "pt.npz", **{name.replace("PaliGemma/", "params/"): a for name, a in tensors.items()})
        return folder / "pt.npz", read_all(open_npz(folder / "pt.npz")), "open_npz"
    write_checkpoint(weights, folder, kind)
    if kind in ("pi0", "openpi"):
        return folder, read_all(open_orbax(folder / "params")), "open_orbax"
    return folder, read_all(open_safetensors(folder / "model.safetensors")), "open_safetensors"


def one_per_kind(names):
    """The first of the tensors whose names differ by the number of a layer alone."""
    kinds = {re.sub(r"\.\d+\.", ".*.", name): name for name in reversed(list(names))}
    return list(kinds.values())


def damaged(array):
    """The tensor, damaged in each way that its shape allows; None: not there."""
    ways = {"deleted": None, "renamed": None, "nan": array.copy()}
    ways["nan"].flat[array.size // 2] = np.nan
    if array.T.shape != array.shape:  # a square matrix that is transposed looks like any other
        ways["transposed"] = np.ascontiguousarray(array.T)
    return ways


@pytest.mark.parametrize(("kind", "name"), SOURCES)
def test_any_one_damaged_tensor_is_named(tmp_path, monkeypatch, kind, name):
    path, arrays, opener = source_of(kind, name, tmp_path / "x")
    whole = {name: in_memory(array) for name, array in arrays.items()}
    found = dict(whole)
    module = importlib.import_module(f"pi0_jax.convert.formats.{kind.replace('-', '_')}")
    opened = getattr(module, opener)
    weights = ("params", "model.safetensors", "pt.npz")
    monkeypatch.setattr(module, opener, lambda file: found if file.name in weights else opened(file))
    tied = [name for name in arrays if name.endswith(SPARE) and "gemma_expert" not in name]
    first = one_per_kind(arrays)
    for victim, array in arrays.items():
        for way, changed in damaged(array).items():
            if way != "nan" and victim not in first:
                continue
            found = {n: tensor for n, tensor in whole.items() if n != victim}
            if way == "renamed":
                found[victim + "_"] = whole[victim]
            elif changed is not None:
                found[victim] = in_memory(changed)
            if way == "deleted" and victim.endswith(SPARE) and tied != [victim]:
                read_everything(path)
                continue
            with pytest.raises(ValueError, match=re.escape(victim.removeprefix("model.").removeprefix("params/"))):
                read_everything(path)


def read_everything(path):
    weights = open_checkpoint(path, OVERRIDES)
    read_all({**weights.tensors, **weights.dropped})


def test_numbers_that_are_not_finite_stop_a_conversion_where_nothing_needs_them_too(tmp_path):
    write_checkpoint(tiny_weights("pi05"), tmp_path / "x", "lerobot")
    file = tmp_path / "x/model.safetensors"
    arrays = read_all(open_safetensors(file))
    head = "model.paligemma_with_expert.gemma_expert.lm_head.weight"
    arrays[head][3, 2] = np.inf
    write_safetensors(file, {name: in_memory(array) for name, array in arrays.items()})
    with pytest.raises(ValueError, match=r"gemma_expert\.lm_head\.weight holds numbers that are not finite"):
        convert(tmp_path / "x", tmp_path / "out", overrides=OVERRIDES)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


SQUARE = dict(num_heads=8, language=ExpertConfig(width=64, mlp_dim=64), action=ExpertConfig(width=64, mlp_dim=64))
"""Heads of 8: then a layer's projections are square in PyTorch's layout."""


@pytest.mark.parametrize("kind", ["openpi", "openpi-torch", "lerobot", "pi0"])
def test_any_change_of_a_converted_folder_is_named_a_square_transposed_too(tmp_path, kind):
    weights = tiny_weights("pi05", model=tiny_config("pi05", **SQUARE))
    write_checkpoint(weights, tmp_path / "source", "pi0")
    convert(tmp_path / "source", tmp_path / "x", kind)
    orbax = kind in ("openpi", "pi0")
    file = tmp_path / "x" / ("params" if orbax else "model.safetensors")
    arrays = read_all((open_orbax if orbax else open_safetensors)(file))
    square = [name for name, a in arrays.items() if a.ndim > 1 and a.shape[-1] == a.shape[-2] and "head" not in name]
    assert len(square) >= (3 if orbax else 12)
    for victim in one_per_kind(square):
        changed = {**arrays, victim: np.ascontiguousarray(arrays[victim].swapaxes(-1, -2))}
        if orbax:
            shutil.rmtree(file)
        (write_orbax if orbax else write_safetensors)(file, {n: in_memory(a) for n, a in changed.items()})
        with pytest.raises(ValueError, match=r"(?s)1 of \d+ parameters are not what .*conversion\.json says") as error:
            convert(tmp_path / "x", tmp_path / "out")
        assert re.sub(r"\.\d+\.", ".*.", victim.removeprefix("model.")) in str(error.value)
        assert not (tmp_path / "out").exists()
    record = convert(tmp_path / "x", tmp_path / "out", edited=True)
    assert record["source"]["sha256"] == record["weights_sha256"]
    convert(tmp_path / "out", tmp_path / "again")  # what was written then is on record


def test_the_command_line_says_how_to_go_on_with_weights_that_were_changed(tmp_path, capsys):
    save_tiny(tmp_path / "source", "pi0")
    ours, out = str(tmp_path / "ours"), str(tmp_path / "out")
    assert cli.main(["convert", str(tmp_path / "source"), ours]) == 0
    record = json.loads((tmp_path / "ours/conversion.json").read_text())
    shutil.rmtree(tmp_path / "ours/params")
    write_orbax(tmp_path / "ours/params", tiny_weights("pi0", seed=1).tensors)
    assert cli.main(["convert", ours, out, "--to", "openpi"]) == 1
    said = capsys.readouterr().err
    assert f"{len(record['leaves_sha256'])} of {len(record['leaves_sha256'])} parameters" in said
    assert "--edited" in said
    assert "action_out/kernel" in said
    assert cli.main(["convert", ours, out, "--to", "openpi", "--edited"]) == 0
