"""openpi's own π0 and π0.5, run in openpi's own Python, one command a line: the other side of `latency.py`.

    PYTHON openpi_jax.py CHECKOUT < commands          (CHECKOUT fast: π0-FAST, for `decoding.py`)

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


def build_fast(openpi: types.SimpleNamespace, want: dict[str, Any]) -> Callable[[], Any]:
    """openpi's π0-FAST at a reduced size as a function without arguments: `want["tokens"]` greedy ones."""
    import flax.nnx as nnx
    import jax
    import jax.numpy as jnp
    import numpy as np
    import orbax.checkpoint as ocp

    size = want["size"]
    resize(openpi, size)
    # All that openpi takes from ml_collections is a dictionary with attributes, which Flax makes another dictionary of.
    anything = type("Anything", (type,), {"__instancecheck__": lambda kind, value: True})
    config = anything("ConfigDict", (dict,), {"__getattr__": dict.__getitem__})
    sys.modules.setdefault("ml_collections", mock.MagicMock(ConfigDict=config, __spec__=None))
    gemma, module = (importlib.import_module(f"openpi.models.{name}") for name in ("gemma_fast", "pi0_fast"))
    usual, changed = gemma.get_config, size["language"] | size["stack"] | {"vocab_size": size["vocab"]}
    gemma.get_config = lambda variant: config(dict(usual(variant)) | changed)
    inputs = dict(np.load(want["inputs"]))
    length = inputs["prompt"].shape[1]
    model = module.Pi0FASTConfig(dtype="float32", max_token_len=length).create(jax.random.key(0))
    graph, state = nnx.split(model)
    state.replace_by_pure_dict(spread(state.to_pure_dict()))
    model = nnx.merge(graph, state)
    ocp.PyTreeCheckpointer().save(Path(want["weights"]).absolute(), {"params": state.to_pure_dict()})
    cameras = ("base_0_rgb", "base_1_rgb", "wrist_0_rgb")
    zeros = jnp.zeros((1, length), jnp.int32)
    observation = openpi.model.Observation(
        images={name: jnp.asarray(inputs[name]) for name in cameras},
        image_masks={name: jnp.ones(1, bool) for name in cameras},
        state=jnp.zeros((1, 32)),
        tokenized_prompt=jnp.asarray(inputs["prompt"]),
        tokenized_prompt_mask=jnp.asarray(inputs["prompt_mask"]),
        token_ar_mask=zeros,
        token_loss_mask=zeros.astype(bool),
    )
    sample = openpi.nnx_utils.module_jit(model.sample_actions, static_argnames="max_decoding_steps")
    return lambda: jax.block_until_ready(
        sample(jax.random.key(0), observation, max_decoding_steps=want["tokens"], temperature=0.0)
    )


def sampler_of_shapes(openpi: types.SimpleNamespace, variant: str, num_steps: int) -> tuple[Callable[..., Any], tuple]:
    """openpi's sampler at full size as a function, and the shapes of its arguments: nothing is allocated."""
    import flax.nnx as nnx
    import jax
    import jax.numpy as jnp

    config = openpi.pi0_config.Pi0Config(pi05=variant == "pi05")
    graph, state = nnx.split(nnx.eval_shape(config.create, jax.random.key(0)))
    # Its policies load parameters in bfloat16, and make images float32 before the program.
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), state)
    observation, _ = config.inputs_spec(batch_size=1)
    key = jax.eval_shape(lambda: jax.random.key(0))

    def sample(state, key, observation):
        return nnx.merge(graph, state).sample_actions(key, observation, num_steps=num_steps)

    return sample, (state, key, observation)


def import_for_training(checkout: Path | str) -> types.SimpleNamespace:
    """openpi's modules with those of its training, without augmentation."""
    unused = ["wandb", "tqdm_loggable", "tqdm_loggable.auto", "openpi.models_pytorch.pi0_pytorch"]
    unused += [f"openpi.training.{name}" for name in ("checkpoints", "config", "data_loader", "weight_loaders")]
    modules = import_openpi(checkout, *unused)
    plain = modules.model.preprocess_observation
    modules.model.preprocess_observation = lambda key, observation, *, train=False, **rest: plain(
        key, observation, train=False, **rest
    )
    return modules


def training_functions(openpi: types.SimpleNamespace, **fields: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """openpi's initial training state, a function of a key, and its update, a function of key, state and batch.

    Args:
        openpi: of `import_for_training`.
        fields: of its `Pi0Config`.
    """
    import openpi.training.optimizer as optimizers
    import openpi.training.utils as training_utils
    from flax import nnx

    import train  # its scripts/train.py

    config = openpi.pi0_config.Pi0Config(**fields)
    transform = optimizers.create_optimizer(optimizers.AdamW(), optimizers.CosineDecaySchedule())
    settings = types.SimpleNamespace(trainable_filter=nnx.Param)

    def start(key):
        model = config.create(key)
        params = nnx.state(model)
        return training_utils.TrainState(
            step=0, params=params, model_def=nnx.graphdef(model), tx=transform, opt_state=transform.init(params),
            ema_decay=0.99, ema_params=params,
        )  # fmt: skip

    return start, lambda key, state, batch: train.train_step(settings, key, state, batch)


def lower_update(openpi: types.SimpleNamespace, variant: str, batch_size: int, mesh: Any):
    """openpi's update at full size, divided over the devices of a mesh as its scripts/train.py does it."""
    import jax
    import openpi.training.sharding as sharding

    start, update = training_functions(openpi, pi05=variant == "pi05")
    key = jax.eval_shape(lambda: jax.random.key(0))
    whole, split = (
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in ((), (mesh.axis_names,))
    )
    state = jax.eval_shape(start, key)
    places = sharding.fsdp_sharding(state, mesh)
    batch = openpi.pi0_config.Pi0Config(pi05=variant == "pi05").inputs_spec(batch_size=batch_size)

    def put(shapes, where):
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where)

    everywhere = jax.tree.map(lambda _: split, batch)
    jitted = jax.jit(update, donate_argnums=1, out_shardings=(places, whole))
    with sharding.set_mesh(mesh):
        return jitted.lower(put(key, whole), put(state, places), put(batch, everywhere))


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
    chosen = build_fast if "fast" in sys.argv[2:] else build
    serve(functools.partial(chosen, import_openpi(sys.argv[1])))
