"""openpi's own π0 and π0.5, run in openpi's own Python, one command a line: the other side of `latency.py`.

    PYTHON openpi_jax.py CHECKOUT < commands

CHECKOUT is a folder with openpi's sources; PYTHON needs jax, flax, orbax-checkpoint, einops, augmax, jaxtyping and
beartype in openpi's versions, nothing else: what its JAX models import but do not use is left empty. Commands and
answers are JSON:

    {"build": {"variant", "sizes", "inputs", "num_steps", "weights"}}  →  {"compile_seconds"}, with a first call
    {"run": 5}                                                         →  {"seconds": [of each call]}
    {"save": PATH}                                                     →  {}; the last call's actions, .npy

`sizes` null means full size in bfloat16. Random weights are written to the folder `weights`, unless that is null.
"""

from __future__ import annotations

import functools
import json
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock


def import_openpi(checkout: str) -> types.SimpleNamespace:
    """openpi's modules, without torch and safetensors where these are not installed."""
    sys.path[:0] = [f"{checkout}/src", f"{checkout}/packages/openpi-client/src"]
    for name in (
        "torch",
        "torch.nn",
        "torch.nn.functional",
        "safetensors",
        "safetensors.torch",
        "openpi.models_pytorch",
    ):
        try:
            if name.startswith("openpi"):
                raise ImportError
            __import__(name)
        except ImportError:
            sys.modules[name] = mock.MagicMock(Tensor=type("Tensor", (), {}), uint8=object(), __spec__=None)
    import openpi.models.gemma as gemma
    import openpi.models.model as model
    import openpi.models.pi0 as pi0
    import openpi.models.pi0_config as pi0_config
    import openpi.models.siglip as siglip
    import openpi.shared.nnx_utils as nnx_utils

    return types.SimpleNamespace(
        gemma=gemma, model=model, pi0=pi0, pi0_config=pi0_config, siglip=siglip, nnx_utils=nnx_utils
    )


def create(openpi: types.SimpleNamespace, variant: str, sizes: dict[str, Any] | None):
    """A model of openpi's with random weights, at full size in bfloat16, or at the given sizes in float32."""
    import jax

    config = openpi.pi0_config.Pi0Config(pi05=variant == "pi05")
    if sizes is None:
        return config.create(jax.random.key(0))
    experts = {
        "gemma_2b": openpi.gemma.Config(width=sizes["width"], mlp_dim=sizes["mlp_dim"], **sizes["both"]),
        "gemma_300m": openpi.gemma.Config(
            width=sizes["action_width"], mlp_dim=sizes["action_mlp_dim"], **sizes["both"]
        ),
    }
    image_encoder = openpi.siglip.Module
    # For good: the modules look the sizes up again at every call.
    openpi.gemma.get_config = experts.get
    openpi.gemma.PALIGEMMA_VOCAB_SIZE = sizes["vocab_size"]
    openpi.siglip.Module = lambda **how: image_encoder(**how | {"variant": sizes["vision"]})
    config = openpi.pi0_config.Pi0Config(pi05=variant == "pi05", dtype="float32")
    return config.create(jax.random.key(0))


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

    model = create(openpi, want["variant"], want["sizes"])
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

    replies, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    call: Any = None
    actions: Any = None

    def seconds() -> float:
        nonlocal actions
        start = time.perf_counter()
        actions = call()
        return time.perf_counter() - start

    for line in sys.stdin:
        command = json.loads(line)
        if "build" in command:
            call = build(command["build"])
            answer: dict[str, Any] = {"compile_seconds": seconds()}
        elif "save" in command:
            np.save(command["save"], np.asarray(actions))
            answer = {}
        else:
            answer = {"seconds": [seconds() for _ in range(command["run"])]}
        print(json.dumps(answer), file=replies, flush=True)


if __name__ == "__main__":
    serve(functools.partial(build, import_openpi(sys.argv[1])))
