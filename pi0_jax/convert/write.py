"""Checkpoints of every format, written from our leaves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from pi0_jax import checkpoint
from pi0_jax.convert import lerobot, openpi, torch
from pi0_jax.convert.files import Format, write_json
from pi0_jax.convert.formats import Weights
from pi0_jax.convert.lazy import Index, Tensor, Tensors, write_orbax, write_safetensors
from pi0_jax.convert.leaves import is_velocity_expert, leaves, sizes
from pi0_jax.convert.rules import from_ours


def write_checkpoint(weights: Weights, folder: Path, kind: Format, asset_id: str | None = None) -> None:
    """Writes a checkpoint into a new folder.

    Raises:
        ValueError: the format cannot hold it.
    """
    if kind not in _WRITE:
        raise ValueError(f"{kind} can be read and not written; the formats to write are {', '.join(_WRITE)}.")
    folder.mkdir(parents=True)
    _WRITE[kind](weights, folder, asset_id or weights.policy.robot)
    if weights.tokenizer is not None and kind != "pi0":
        (folder / "tokenizer.model").write_bytes(weights.tokenizer)


def lost(weights: Weights, kind: Format) -> list[str]:
    """What a format has no place for, beside the weights: a sentence each."""
    notes = []
    if weights.tokenizer is not None and kind == "lerobot":
        notes.append(
            "LeRobot names its tokenizer and does not read files: tokenizer.model lies beside the weights unused"
        )
    policy = weights.policy
    delay = policy.model.max_delay
    sampler = {"solver": "euler", "grid_power": 1.0, "guidance_scale": 1.0}
    if kind != "pi0" and (other := [name for name, usual in sampler.items() if getattr(policy, name) != usual]):
        settings = ", ".join(f"{name} {getattr(policy, name)}" for name in other)
        notes.append(f"{kind} samples by Euler's method with equal steps and no guidance, without {settings}")
    if delay and kind != "pi0":
        later = f' (LeRobot after 0.6.1 has, of π0.5: "rtc_training_max_delay": {delay} in config.json)'
        notes.append(
            f"{kind} has no setting for a model that was trained to go on from up to {delay} actions (max_delay)"
            + later * (kind == "lerobot" and policy.model.variant == "pi05")
            + "; conversion.json remembers it"
        )
    return notes


def foreign_tensors(weights: Weights, kind: Format) -> Tensors:
    """The tensors of another format, by their names there, read from our leaves.

    Raises:
        ValueError: the format has no place for a leaf, or the weights are of a head that exists only here.
    """
    model = weights.policy.model
    if not is_velocity_expert(model):
        raise ValueError(
            f"{kind} holds action experts that predict velocities, and {weights.path} has the head {model.head!r} and "
            f"predicts {model.prediction}: nothing there could run it. Such weights convert to pi0 only (--to pi0)."
        )
    table = {"openpi": openpi.rules, "openpi-torch": torch.rules, "lerobot": torch.rules}[kind](model.variant)
    found = from_ours(table, leaves(model), weights.tensors, sizes(model))
    if kind == "openpi":
        return found
    if model.variant != "pi0_fast":
        # LeRobot's strict loading wants the unused layer too.
        embedding = weights.tensors["embedding"]
        found[torch.EXPERT_HEAD] = _zeros((embedding.shape[0], model.action.width), embedding.dtype)
    if kind == "openpi-torch":
        del found[torch.EMBEDDING]
        return found
    return {f"model.{name}": tensor for name, tensor in found.items()}


def _write_pi0(weights: Weights, folder: Path, asset_id: str) -> None:
    write_orbax(folder / "params", weights.tensors)
    (folder / "assets").mkdir()
    assets = checkpoint.Assets(weights.policy, weights.norm_stats, weights.tokenizer, weights.train)
    checkpoint.write_assets(folder / "assets", assets)


def _write_openpi(weights: Weights, folder: Path, asset_id: str) -> None:
    tensors = foreign_tensors(weights, "openpi")
    write_orbax(folder / "params", tensors)
    _write_openpi_stats(weights, folder, asset_id)


def _write_openpi_torch(weights: Weights, folder: Path, asset_id: str) -> None:
    tensors, model = foreign_tensors(weights, "openpi-torch"), weights.policy.model
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    config = {
        "action_dim": model.action_dim,
        "action_horizon": model.action_horizon,
        "paligemma_variant": "gemma_2b",
        "action_expert_variant": "gemma_300m",
        "precision": lerobot.dtype_name(weights.tensors["embedding"]),
    }
    write_json(folder / "config.json", config)
    _write_openpi_stats(weights, folder, asset_id)


def _write_lerobot(weights: Weights, folder: Path, asset_id: str) -> None:
    write_safetensors(folder / "model.safetensors", foreign_tensors(weights, "lerobot"), {"format": "pt"})
    lerobot.write_folder(folder, weights.policy, weights.norm_stats, lerobot.dtype_name(weights.tensors["embedding"]))


_WRITE: dict[str, Callable[[Weights, Path, str], None]] = {
    "pi0": _write_pi0,
    "openpi": _write_openpi,
    "openpi-torch": _write_openpi_torch,
    "lerobot": _write_lerobot,
}


def _write_openpi_stats(weights: Weights, folder: Path, asset_id: str) -> None:
    if weights.norm_stats is not None:
        assets = folder / "assets" / asset_id
        if ".." in assets.parts or Path(asset_id).is_absolute():
            raise ValueError(f"--asset-id {asset_id} does not name a folder under assets/.")
        assets.mkdir(parents=True)
        write_json(assets / "norm_stats.json", weights.norm_stats)


def _zeros(shape: tuple[int, ...], dtype: np.dtype) -> Tensor:
    def read(i: Index) -> np.ndarray:
        zeros = np.zeros(shape, dtype)  # takes no memory until it is looked at
        return zeros if i is None else zeros[i]

    return Tensor(shape, dtype, read, stacked=True)
