"""LoRA adapters as peft writes them for LeRobot's policies: adapter_config.json and adapter_model.safetensors.

    base_model.model.<module>.lora_A.weight  [rank, in]     the module computes w + alpha / rank · B A,
    base_model.model.<module>.lora_B.weight  [out, rank]    or alpha / √rank with use_rslora
    base_model.model.<module>.weight                        weights that were trained as a whole (modules_to_save)

`alpha_pattern` and `rank_pattern` say which modules have others than `lora_alpha` and `r`. Such a folder is read with
its base weights, to which the adapters are added. Ours are written without adding them. openpi's form has a pair per
head of queries, keys and values: in one matrix, the rank is heads times that, and B has blocks along its diagonal. In
the output projection, where heads are summed between the pair, B is the sum of the heads' b.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pi0_jax.convert.files import read_json, write_json
from pi0_jax.convert.formats import Format, OpenCheckpoint, Overrides, lerobot, open_checkpoint, openpi_torch
from pi0_jax.convert.lazy import (
    LazyArray,
    LazyArrays,
    all_finite,
    computed,
    open_safetensors,
    pieces_of_both,
    write_safetensors,
)
from pi0_jax.convert.parameters import parameters, replaced
from pi0_jax.convert.rules import Rule, from_ours, to_ours
from pi0_jax.errors import UserError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
LAYERS = {"language": f"{openpi_torch.LANGUAGE}.layers", "action": f"{openpi_torch.EXPERT}.model.layers"}
"""The experts' layers among PyTorch's modules."""


# ------------------------------------------------------------------------------------------------------------- reading


def _open(folder: Path, overrides: Overrides) -> OpenCheckpoint:
    config = _read_config(folder)
    stated = config.get("base_model_name_or_path") or ""
    path = overrides.base or (stated if Path(stated).is_dir() else None)
    if path is None:
        raise UserError(
            f"{folder} holds adapters, and their base weights ({stated or 'not named'}) are not on this machine; say "
            "where they are with --base, a folder or a URL."
        )
    base = open_checkpoint(path, dataclasses.replace(overrides, base=None))
    if any("_lora_" in name for name in base.tensors):
        raise UserError(f"the base weights {path} have adapters themselves; merge them first, with --merge-lora.")
    policy, stats = base.policy, base.norm_stats
    if (folder / "config.json").is_file():
        policy = replaced(policy, lerobot.read_settings(folder / "config.json", read_json(folder / "config.json"))[0])
        stats = lerobot.read_stats(folder) or stats
    tensors = base.tensors | _adapted(folder, config, base)
    return base._replace(
        format="peft", path=folder, policy=policy, tensors=tensors, norm_stats=stats, train=None, step=None
    )


def _read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json; UserError for what is not plain LoRA."""
    config = read_json(folder / CONFIG)
    if (kind := config.get("peft_type")) != "LORA":
        raise UserError(f"{folder} holds adapters of type {kind}; LORA is read.")
    for name in ("use_dora", "lora_bias", "layer_replication", "fan_in_fan_out", "alora_invocation_tokens"):
        if config.get(name):
            raise UserError(
                f"{folder / CONFIG} has {name}, which is not read. Merge the adapters with peft, then convert."
            )
    return config


def _adapted(folder: Path, config: dict[str, Any], base: OpenCheckpoint) -> LazyArrays:
    """Our parameters that the folder changes: adapters added, and others in place of the base's."""
    rules = _rules(base.policy.model.variant)
    wanted = {path: p for path, p in parameters(base.policy.model).items() if path in rules}
    plain = from_ours(tuple(rules.values()), wanted, base.tensors)
    changed = _changed(folder, config, plain)
    theirs = {path: {name for name, *_ in rules[path].tensors(parameter)} for path, parameter in wanted.items()}
    touched = [path for path in wanted if theirs[path] & set(changed)]
    return to_ours(rules, {path: wanted[path] for path in touched}, plain | changed)


def _rules(variant: str) -> dict[str, Rule]:
    """The rule of each of our parameters; of the two for the embedding, the one that the model reads."""
    return {rule.ours: rule for rule in reversed(openpi_torch.rules(variant))}


def _changed(folder: Path, config: dict[str, Any], plain: LazyArrays) -> LazyArrays:
    """Weights by PyTorch's names, with the adapters added. UserError lists what has no place in the model."""
    stored = all_finite(open_safetensors(folder / WEIGHTS))
    found: LazyArrays = {}
    problems = []
    for key, tensor in stored.items():
        name = key.removeprefix(_PREFIX)
        match = re.fullmatch(r"(.*)\.lora_(A|B)(?:\.\w+)?\.weight", name)
        target = _known(f"{match.group(1)}.weight" if match else name, plain)
        if target is None:
            problems.append(f"unexpected: {key}")
        elif match is None and tensor.shape == plain[target].shape:
            found[target] = tensor
        elif match is None:
            problems.append(f"{key} has shape {tensor.shape}, and {plain[target].shape} is needed")
        elif match.group(2) == "A":
            b = stored.get(key.replace(".lora_A.", ".lora_B."))
            if b is None or (b.shape[0], *tensor.shape[1:]) != plain[target].shape or b.shape[1:] != tensor.shape[:1]:
                shapes = f"A {tensor.shape} and B {'missing' if b is None else b.shape}"
                problems.append(f"{match.group(1)}: {shapes} make no weight of shape {plain[target].shape}")
            else:
                found[target] = _added(plain[target], tensor, b, scale_of(match.group(1), tensor.shape[0], config))
    if problems:
        shown = "\n  ".join(problems[:20]) + (f"\n  and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise UserError(f"the adapters of {folder} do not fit their base:\n  {shown}")
    return found


def _known(name: str, plain: LazyArrays) -> str | None:
    """The name in the model, with or without LeRobot's prefix."""
    return next((each for each in (name, name.removeprefix("model.")) if each in plain), None)


def scale_of(module: str, rank: int, config: dict[str, Any]) -> float:
    """Factor of B A for a module, as peft computes it from its configuration and the adapter's rank."""
    patterns = config.get("alpha_pattern") or {}
    alpha = next(
        (a for key, a in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), config.get("lora_alpha", 8)
    )
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _added(w: LazyArray, a: LazyArray, b: LazyArray, scale: float) -> LazyArray:
    def read() -> np.ndarray:
        product = b.read(None).astype(np.float32) @ a.read(None).astype(np.float32)
        return (w.read(None).astype(np.float32) + np.float32(scale) * product).astype(dtype)

    dtype = np.result_type(w.dtype, a.dtype, b.dtype)
    return computed(w.shape, dtype, read)


# ------------------------------------------------------------------------------------------------------------- writing


Read = Callable[[int], np.ndarray]
"""Reads something of a layer."""


class _Pair(NamedTuple):
    """The adapter of one kind of module in all layers."""

    module: str
    """Its end, such as `self_attn.q_proj`."""
    rank: int
    alpha: float | int
    a: Read
    """A of a layer, `[rank, in]`."""
    b: Read
    """B of a layer, `[out, rank]`."""


def _pairs(opened: OpenCheckpoint, expert: str) -> Iterator[_Pair]:
    """The adapters of an expert in peft's form."""
    scale = getattr(opened.policy.model, expert).lora_scale

    def halves(name: str) -> tuple[Read, Read, int] | None:
        path = f"backbone/layers/{expert}/{name}"
        if f"{path}_lora_a" not in opened.tensors:
            return None
        a, b = opened.tensors[f"{path}_lora_a"], opened.tensors[f"{path}_lora_b"]
        return a.read, b.read, a.shape[-1]

    if found := halves("attn/q"):
        yield _per_head("self_attn.q_proj", *found, scale)
    if found := halves("attn/kv"):
        a, b, rank = found
        for entry, letter in enumerate("kv"):
            yield _per_head(f"self_attn.{letter}_proj", _entry(a, entry), _entry(b, entry), rank, scale)
    if found := halves("attn/o"):
        a, b, rank = found
        yield _Pair("self_attn.o_proj", rank, scale * rank, _flat(a), _summed(b))
    if found := halves("mlp/gate_up"):
        a, b, rank = found
        for entry, word in enumerate(("gate", "up")):
            yield _Pair(f"mlp.{word}_proj", rank, rank, _transposed(_entry(a, entry)), _transposed(_entry(b, entry)))
    if found := halves("mlp/down"):
        a, b, rank = found
        yield _Pair("mlp.down_proj", rank, rank, _transposed(a), _transposed(b))


def _entry(read: Read, entry: int) -> Read:
    return lambda layer: read(layer)[entry]


def _transposed(read: Read) -> Read:
    return lambda layer: read(layer).T


def _flat(read: Read) -> Read:
    return lambda layer: read(layer).reshape(-1, read(layer).shape[-1]).T


def _summed(read: Read) -> Read:
    """Σb over the heads, `[embed, rank]`, in single precision."""
    return lambda layer: read(layer).astype(np.float32).sum(0).T


def _per_head(module: str, a: Read, b: Read, rank: int, scale: float) -> _Pair:
    """A pair per head, a `[embed, heads, rank]` and b `[heads, rank, head_dim]`, as one of rank heads · rank."""
    heads = b(0).shape[0]

    def blocks(layer: int) -> np.ndarray:
        of_head = b(layer)
        out = np.zeros((heads, of_head.shape[2], heads, rank), of_head.dtype)
        for head in range(heads):
            out[head, :, head] = of_head[head].T
        return out.reshape(heads * of_head.shape[2], heads * rank)

    total = heads * rank
    return _Pair(module, total, scale * total, lambda layer: a(layer).reshape(-1, total).T, blocks)


def _write(opened: OpenCheckpoint, folder: Path, asset_id: str) -> None:
    """Adapters and what else was trained, then LeRobot's configuration and processors. What was written is compared."""
    pairs = [(expert, pair) for expert in LAYERS for pair in _pairs(opened, expert)]
    if not pairs:
        raise UserError(f"{opened.path} has no LoRA adapters; --to lerobot writes all of its weights.")
    tensors: LazyArrays = {}
    for expert, pair in pairs:
        for layer in range(opened.policy.model.depth):
            module = f"{_PREFIX}model.{LAYERS[expert]}.{layer}.{pair.module}"
            for letter, read in (("A", pair.a), ("B", pair.b)):
                first = read(0)
                half = computed(first.shape, first.dtype, lambda read=read, layer=layer: read(layer))
                tensors[f"{module}.lora_{letter}.weight"] = half
    base = _base(opened)
    trained = _trained_whole(opened, base)
    tensors |= {f"{_PREFIX}model.{name}": tensor for name, tensor in trained.items()}
    write_safetensors(folder / WEIGHTS, tensors, {"format": "pt"})
    for (name, wrote), stored in zip(tensors.items(), open_safetensors(folder / WEIGHTS).values(), strict=True):
        if wrote.read(None).tobytes() != stored.read(None).tobytes():
            raise UserError(f"verification failed at {name}: it was read back with other bits.")
    keys = {rf"{re.escape(LAYERS[expert])}\.\d+\.{re.escape(pair.module)}": pair for expert, pair in pairs}
    name = opened.base[0].removeprefix("hf://") if opened.base and base.format == "lerobot" else None
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": name,
        "revision": None,
        "inference_mode": True,
        "target_modules": rf"(.*\.)?({'|'.join(keys)})",
        "modules_to_save": sorted({f"model.{_module(name)}" for name in trained}) or None,
        "r": max(pair.rank for pair in keys.values()),
        "lora_alpha": max(_whole(pair.alpha) for pair in keys.values()),
        "rank_pattern": {key: pair.rank for key, pair in keys.items()},
        "alpha_pattern": {key: _whole(pair.alpha) for key, pair in keys.items()},
        "use_rslora": False,
        "use_dora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }
    write_json(folder / CONFIG, config)
    lerobot.write_settings(folder, opened, use_peft=True)


def _whole(alpha: float | int) -> float | int:
    """The number as peft's configurations have it, an integer where it is one."""
    return int(alpha) if alpha == int(alpha) else alpha


def _base(opened: OpenCheckpoint) -> OpenCheckpoint:
    """The weights that the adapters were trained on; UserError if nothing says where they are."""
    stated = opened.base[1] if opened.base else opened.train.init_from if opened.train else None
    if stated is None or not Path(stated).expanduser().exists():
        raise UserError(
            f"{opened.path} was trained from {stated or 'weights that are not on record'}. Adapters alone are no "
            "policy: name their base weights with --base, so that what else was trained is written beside them."
        )
    model = opened.policy.model
    hints = Overrides(
        horizon=model.action_horizon,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        vision_heads=model.vision.num_heads,
    )
    return open_checkpoint(stated, hints)


def _trained_whole(opened: OpenCheckpoint, base: OpenCheckpoint) -> LazyArrays:
    """PyTorch's tensors of the modules with parameters that are other ones than the base's, adapters aside.

    Rounding is no change: frozen parameters may be kept in fewer bits. peft wants all tensors of such a module.
    """
    wanted = {path: p for path, p in parameters(opened.policy.model).items() if "_lora_" not in path}
    rules, modules = _rules(opened.policy.model.variant), set()
    for path, parameter in wanted.items():
        ours, theirs = opened.tensors[path], base.tensors.get(path)
        if theirs is None or theirs.shape != ours.shape:
            raise UserError(f"{path} is {ours.shape}, and {theirs.shape if theirs else 'absent'} in {base.path}.")
        if not all(np.array_equal(x, y.astype(x.dtype)) for x, y in pieces_of_both(ours, theirs)):
            modules |= {_module(name) for name, *_ in rules[path].tensors(parameter)}
    tensors = from_ours(tuple(rules.values()), wanted, opened.tensors)
    return {name: tensor for name, tensor in tensors.items() if _module(name) in modules}


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _lost(opened: OpenCheckpoint) -> list[str]:
    notes = lerobot.FORMAT.lost(opened)
    if opened.base is None or not opened.base[0].startswith("hf://"):
        notes.append(f"set base_model_name_or_path in {CONFIG} to the base weights in LeRobot's format, if it is null")
    return notes


FORMAT = Format(
    "peft",
    f"{CONFIG} and {WEIGHTS}: LoRA adapters of LeRobot's π0 and π0.5, read with --base",
    lambda path: path if (path / CONFIG).is_file() and (path / WEIGHTS).is_file() else None,
    _open,
    _write,
    _lost,
    card=True,
    partial=True,
)
