"""openpi's own π0 and π0.5, run in openpi's own Python, one command a line: the other side of `latency.py`.

    PYTHON openpi_jax.py CHECKOUT < commands

CHECKOUT is a folder with openpi's sources; PYTHON needs jax, flax, orbax-checkpoint, einops, augmax, jaxtyping and
beartype in openpi's versions, nothing else: what its JAX models import but do not use is left empty. Commands and
answers are JSON:

    {"build": {"variant", "size", "inputs", "num_steps", "weights"}}  →  {"compile_seconds"}, with a first call
    {"run": 5}                                                         →  {"seconds": [of each call]}
    {"save": PATH}                                                     →  {}; the last call's actions, .npy

`size` null means full size in bfloat16. Random weights are written to the folder `weights`, unless that is null.
"""

from __future__ import annotations

import functools
import importlib
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from sides import answer


def import_openpi(checkout: Path | str, *unused: str) -> types.SimpleNamespace:
    """openpi's modules; those it imports and does not use, and the `unused` ones, are empty."""
    sys.path[:0] = [f"{checkout}/src", f"{checkout}/packages/openpi-client/src", f"{checkout}/scripts"]
    torch = ("torch", "torch.nn", "torch.nn.functional", "safetensors", "safetensors.torch", "openpi.models_pytorch")
    named_in_annotations = {"Tensor": type("Tensor", (), {})} | dict.fromkeys(
        ("uint8", "TrainConfig", "WeightLoader"), object
    )
    for name in (*torch, *unused):
        sys.modules[name] = mock.MagicMock(**named_in_annotations, __spec__=None)
    names = ("models.gemma", "models.model", "models.pi0_config", "models.siglip", "shared.nnx_utils")
    modules = {name.partition(".")[2]: importlib.import_module(f"openpi.{name}") for name in names}
    return types.SimpleNamespace(**modules)


def resize(openpi: types.SimpleNamespace, size: dict[str, Any]) -> None:
    """Replaces the sizes of openpi's released models, for good: its modules look them up at every call."""
    experts = {"gemma_2b": size["language"], "gemma_300m": size["action"]}
    openpi.gemma.get_config = lambda variant: openpi.gemma.Config(**experts[variant], **size["stack"])
    openpi.gemma.PALIGEMMA_VOCAB_SIZE = size["vocab"]
    module, patch = openpi.siglip.Module, (size["patch"],) * 2
    openpi.siglip.Module = lambda **how: module(**how | {"variant": None, "patch_size": patch} | size["vision"])


def spread(params):
    """Leaves that start at zero or one are moved, so that nothing is left out; large ones are left as they are."""
    import jax
    import numpy as np

    rng = np.random.default_rng(0)

    def moved(x):
        return x if x.size > 1e8 else np.asarray(x + 0.02 * rng.normal(size=x.shape), x.dtype)

    return jax.tree.map(moved, params)


def build(openpi: types.SimpleNamespace, want: dict[str, Any]) -> Callable[[], Any]:
    """openpi's sampler on the inputs that are asked for, as a function without arguments."""
    import flax.nnx as nnx
    import jax
    import jax.numpy as jnp
    import numpy as np
    import orbax.checkpoint as ocp

    full = want["size"] is None
    if not full:
        resize(openpi, want["size"])
    config = openpi.pi0_config.Pi0Config(pi05=want["variant"] == "pi05", dtype="bfloat16" if full else "float32")
    model = config.create(jax.random.key(0))
    if want["weights"] is not None:
        graph, state = nnx.split(model)
        state.replace_by_pure_dict(spread(state.to_pure_dict()))
        model = nnx.merge(graph, state)
        ocp.PyTreeCheckpointer().save(Path(want["weights"]).absolute(), {"params": state.to_pure_dict()})
    inputs = dict(np.load(want["inputs"]))
    cameras = openpi.model.IMAGE_KEYS
    images = {name: inputs.get(name, np.zeros_like(inputs[cameras[0]])) for name in cameras}
    present = {name: np.full(len(images[name]), name in inputs) for name in cameras}
    observation = openpi.model.Observation(
        images={name: jnp.asarray(image) for name, image in images.items()},
        image_masks={name: jnp.asarray(x) for name, x in present.items()},
        state=jnp.asarray(inputs["state"]),
        tokenized_prompt=jnp.asarray(inputs["prompt"]),
        tokenized_prompt_mask=jnp.asarray(inputs["prompt_mask"]),
    )
    noise, key, steps = jnp.asarray(inputs["noise"]), jax.random.key(0), want["num_steps"]
    sample = openpi.nnx_utils.module_jit(model.sample_actions, static_argnames="num_steps")
    return lambda: jax.block_until_ready(sample(key, observation, noise=noise, num_steps=steps))


def serve(build: Callable[[dict[str, Any]], Callable[[], Any]]) -> None:
    """Answers commands until there are no more; `build` makes of a command what is to be called."""
    import numpy as np

    call: Any = None
    actions: Any = None

    def seconds() -> float:
        nonlocal actions
        start = time.perf_counter()
        actions = call()
        return time.perf_counter() - start

    def handle(command: dict[str, Any]) -> dict[str, Any]:
        nonlocal call
        if "build" in command:
            call = build(command["build"])
            return {"compile_seconds": seconds()}
        if "save" in command:
            np.save(command["save"], np.asarray(actions))
            return {}
        return {"seconds": [seconds() for _ in range(command["run"])]}

    answer(handle)


if __name__ == "__main__":
    serve(functools.partial(build, import_openpi(sys.argv[1])))
