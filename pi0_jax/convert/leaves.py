"""Our parameter leaves and the letters of their axes; sizes of a model from its letters, and back.

    l  Gemma layers       n  query heads     k  key/value heads    h  head dim         v  vocabulary
    d  language width     f  its MLP         r  R  its LoRA ranks, attention and MLP
    e  action width       g  its MLP         s  S  its LoRA ranks
    L  image layers       D  image width     F  its MLP            N  H  its heads and their dim
    y  x  patch, pixels   p  patches         a  action dim         c  a pair           b  colours
    i  = e                m  = 3 e, modulation                     t  = 2 e (pi0) or e (pi05), input of the time MLP
    P  q  patch of the stem and of what follows it; w  its channels

A letter means the same in every table (`openpi.py`, `torch.py`), so that shapes of foreign tensors give the sizes.
"""

from __future__ import annotations

import dataclasses
import math

from pi0_jax.config import ExpertConfig, ModelConfig, VisionConfig

Sizes = dict[str, int]
"""Letter to size."""

CONSTANT: Sizes = {"c": 2, "b": 3}
EXPERTS = {"language": ("d", "f", "r", "R"), "action": ("e", "g", "s", "S")}
"""Letters of an expert's width, MLP, and LoRA ranks."""


def leaves(config: ModelConfig) -> dict[str, str]:
    """Path of each of the model's parameters, joined by "/", to the letters of its axes."""
    found = _image_encoder(config.vision)
    found["embedding"] = "v d"
    found |= _dense("image_projector", "D d", "d")
    found |= _expert("language", config.language, adaptive=False)
    if config.variant == "pi0_fast":
        return found
    found |= _expert("action", config.action, adaptive=config.variant == "pi05")
    found |= _dense("action_in", "a e", "e") | _dense("action_out", "e a", "a")
    if config.variant == "pi0":
        found |= _dense("state_in", "a e", "e")
    return found | _dense("time_mlp_in", "t e", "e") | _dense("time_mlp_out", "i e", "e")


def is_velocity_expert(config: ModelConfig) -> bool:
    """Whether the model is one that `leaves` describes: π0's action expert, predicting velocities.

    Other heads and predictions exist only here. (ε and v have the same leaves, and would be mistaken for velocities.)
    """
    return config.head == "expert" and config.prediction == "velocity"


def sizes(config: ModelConfig) -> Sizes:
    """Size of each letter of a model."""
    vision, language, action = config.vision, config.language, config.action
    found = CONSTANT | {
        "l": config.depth,
        "n": config.num_heads,
        "k": config.num_kv_heads,
        "h": config.head_dim,
        "v": config.vocab_size,
        "a": config.action_dim,
        "i": action.width,
        "m": 3 * action.width,
        "t": action.width * (2 if config.variant == "pi0" else 1),
        "L": vision.depth,
        "D": vision.width,
        "F": vision.mlp_dim,
        "N": vision.num_heads,
        "H": vision.width // vision.num_heads,
        "y": vision.patch_size,
        "x": vision.patch_size,
        "p": (vision.image_size // vision.patch_size) ** 2,
        "w": vision.stem_width,
        "P": vision.stem_stride,
        "q": vision.patch_size // vision.stem_stride,
    }
    for expert, letters in ((language, EXPERTS["language"]), (action, EXPERTS["action"])):
        values = (expert.width, expert.mlp_dim, expert.lora_attn_rank, expert.lora_mlp_rank)
        found |= dict(zip(letters, values, strict=True))
    return found


def model_of(found: Sizes, config: ModelConfig) -> ModelConfig:
    """`config` with all that the sizes say; the rest (variant, cameras, horizon, prompt length, scales) stays."""
    value = {**sizes(config), **found}

    def expert(before: ExpertConfig, letters: tuple[str, ...]) -> ExpertConfig:
        names = ("width", "mlp_dim", "lora_attn_rank", "lora_mlp_rank")
        return dataclasses.replace(before, **{n: value[letter] for n, letter in zip(names, letters, strict=True)})

    return dataclasses.replace(
        config,
        vision=dataclasses.replace(
            config.vision,
            width=value["D"],
            depth=value["L"],
            mlp_dim=value["F"],
            num_heads=value["N"],
            patch_size=value["y"],
            image_size=math.isqrt(value["p"]) * value["y"],
        ),
        language=expert(config.language, EXPERTS["language"]),
        action=expert(config.action, EXPERTS["action"]),
        depth=value["l"],
        num_heads=value["n"],
        num_kv_heads=value["k"],
        head_dim=value["h"],
        vocab_size=value["v"],
        action_dim=value["a"],
    )


def shape_of(axes: str, found: Sizes) -> tuple[int, ...]:
    """Shape of a leaf or tensor; `(n h)` is one axis of both, 1 is itself.

    Raises:
        KeyError: a letter without size.
    """
    return tuple(math.prod(1 if letter == "1" else found[letter] for letter in group) for group in groups(axes))


def groups(axes: str) -> list[list[str]]:
    """Letters by axis: `l (n h) d` is [[l], [n, h], [d]]."""
    found: list[list[str]] = []
    inside = False
    for token in axes.replace("(", " ( ").replace(")", " ) ").split():
        if token == "(":
            found.append([])
            inside = True
        elif token == ")":
            inside = False
        elif inside:
            found[-1].append(token)
        else:
            found.append([token])
    return found


def _dense(path: str, kernel: str, bias: str) -> dict[str, str]:
    return {f"{path}/kernel": kernel, f"{path}/bias": bias}


def _norm(path: str, axes: str) -> dict[str, str]:
    return {f"{path}/scale": axes, f"{path}/bias": axes}


def _image_encoder(vision: VisionConfig) -> dict[str, str]:
    path, layers = "image_encoder", "image_encoder/layers"
    if vision.stem_width:
        found = _dense(f"{path}/stem", "P P b w", "w") | _norm(f"{path}/stem_norm", "w")
        found |= _dense(f"{path}/patch_embedding", "q q w D", "D")
    else:
        found = _dense(f"{path}/patch_embedding", "y x b D", "D")
    if vision.position == "learned":
        found[f"{path}/position_embedding"] = "1 p D"
    found |= _norm(f"{layers}/attn_norm", "L D") | _norm(f"{layers}/mlp_norm", "L D") | _norm(f"{path}/norm", "D")
    for name in ("query", "key", "value"):
        found |= _dense(f"{layers}/{name}", "L D N H", "L N H")
    found |= _dense(f"{layers}/out", "L N H D", "L D")
    return found | _dense(f"{layers}/mlp_in", "L D F", "L F") | _dense(f"{layers}/mlp_out", "L F D", "L D")


def _expert(name: str, config: ExpertConfig, adaptive: bool) -> dict[str, str]:
    layers = f"backbone/layers/{name}"
    width, mlp, attn_rank, mlp_rank = EXPERTS[name]
    found = {
        f"{layers}/attn/q": f"l {width} n h",
        f"{layers}/attn/kv": f"l c {width} k h",
        f"{layers}/attn/o": f"l n h {width}",
        f"{layers}/mlp/gate_up": f"l c {width} {mlp}",
        f"{layers}/mlp/down": f"l {mlp} {width}",
    }
    if config.lora_attn_rank:
        found |= {
            f"{layers}/attn/q_lora_a": f"l {width} n {attn_rank}",
            f"{layers}/attn/q_lora_b": f"l n {attn_rank} h",
            f"{layers}/attn/kv_lora_a": f"l c {width} k {attn_rank}",
            f"{layers}/attn/kv_lora_b": f"l c k {attn_rank} h",
            f"{layers}/attn/o_lora_a": f"l n h {attn_rank}",
            f"{layers}/attn/o_lora_b": f"l n {attn_rank} {width}",
        }
    if config.lora_mlp_rank:
        found |= {
            f"{layers}/mlp/gate_up_lora_a": f"l c {width} {mlp_rank}",
            f"{layers}/mlp/gate_up_lora_b": f"l c {mlp_rank} {mlp}",
            f"{layers}/mlp/down_lora_a": f"l {mlp} {mlp_rank}",
            f"{layers}/mlp/down_lora_b": f"l {mlp_rank} {width}",
        }
    for path, stacked in ((f"{layers}/attn_norm", "l "), (f"{layers}/mlp_norm", "l "), (f"backbone/{name}_norm", "")):
        if adaptive:
            found |= _dense(f"{path}/modulation", f"{stacked}i m", f"{stacked}m")
        else:
            found[f"{path}/scale"] = f"{stacked}{width}"
    return found
