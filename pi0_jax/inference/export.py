"""A policy's compiled programs and weights as files, for machines without this package.

    weights.safetensors       folded parameters, by name
    program_<n>_<p>.stablehlo n observations with prompts of p tokens, by jax.export
    interface.json            what goes in and comes out, and the normalisation
    tokenizer.model           SentencePiece
    README.md                 how to run it, with jax, numpy and safetensors alone

Programs run for years after they were written, and on newer versions of JAX (see jax.export's guarantees).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from pi0_jax.atomic import written
from pi0_jax.data.normalization import affine
from pi0_jax.errors import require_package
from pi0_jax.inference.policy import Policy
from pi0_jax.inference.shapes import prompt_lengths
from pi0_jax.model.target import tracing_for

PLATFORMS = ("cpu", "cuda", "tpu")

README = """\
# {name}: an exported policy

`interface.json` says what the arrays are. This file runs the program with zeros, and needs jax, numpy and safetensors:

```python
import json, pathlib
import jax, jax.export
import numpy as np
from safetensors.flax import load_file

folder = pathlib.Path({folder!r})
interface = json.loads((folder / "interface.json").read_text())
weights = load_file(folder / "weights.safetensors")
program = jax.export.deserialize(bytearray((folder / "{program}").read_bytes()))
inputs = {{name: np.zeros(x["shape"], x["dtype"]) for name, x in interface["programs"]["{program}"].items()}}
actions = np.asarray(jax.jit(program.call)(weights, inputs))
```

`inputs` holds, for each of the observations: `images/<camera>`, RGB at the model's size, `state`, normalised and filled
up with zeros, `prompt`, token ids, `prompt_mask`, and `noise`, standard normal. `actions` are normalised, too. A value
in the robot's units is `scale * normalised + offset`, by dimension; the further dimensions are filling. The rotation of
a pose (`poses`: where it is among the robot's own numbers) is the first two columns of its matrix.
"""


def export(
    policy: Policy, folder: str | Path, batch_sizes: Sequence[int] = (1,), platforms: Sequence[str] = PLATFORMS
) -> Path:
    """Writes a policy's programs, one for each batch size and length of prompts.

    Args:
        policy: the policy, with its number of steps, solver and weights.
        folder: a new folder.
        batch_sizes: numbers of observations.
        platforms: kinds of devices to run on: cpu, cuda, rocm, tpu.

    Raises:
        FileExistsError: there is such a folder.
        ValueError: flatbuffers or safetensors is not installed, or the solver cannot be exported.
    """
    check(folder)
    from safetensors import SafetensorError
    from safetensors.flax import save_file

    target = Path(folder)
    with written(target) as partial:
        partial.mkdir(parents=True)
        interface, weights = describe(policy), {}
        for size in sorted(set(batch_sizes)):
            for length in prompt_lengths(policy.config.model.prompt_length):
                run, weights, inputs = program(policy, size, length)
                with tracing_for("cpu"):  # the form that all platforms run
                    exported = jax.export.export(jax.jit(run), platforms=list(platforms))(weights, inputs)
                name = f"program_{size}_{length}.stablehlo"
                (partial / name).write_bytes(exported.serialize())
                interface["programs"][name] = {
                    name: {"shape": list(x.shape), "dtype": str(x.dtype)} for name, x in inputs.items()
                }
        try:
            save_file(weights, partial / "weights.safetensors")
        except SafetensorError as error:
            raise OSError(f"cannot write the weights to {target}, and nothing of it is left there: {error}") from error
        (partial / "interface.json").write_text(json.dumps(interface, indent=1) + "\n")
        (partial / "tokenizer.model").write_bytes(policy.tokenizer.model)
        first = next(iter(interface["programs"]))
        text = README.format(name=target.name, folder=str(target.resolve()), program=first)
        (partial / "README.md").write_text(text)
    return target


def check(folder: str | Path) -> None:
    """Raises what `export` would raise before it starts."""
    for name in ("flatbuffers", "safetensors"):  # the first for jax.export
        require_package(name, "export", "exporting a policy")
    if Path(folder).exists():
        raise FileExistsError(f"{folder} exists; choose another folder, or remove it.")


def describe(policy: Policy) -> dict[str, Any]:
    """What goes into a policy's programs and comes out of them, but for the programs."""
    robot, config = policy.robot, policy.config
    maps = {name: affine(policy.stats[name], config.normalization) for name in ("state", "actions")}
    return {
        "robot": robot.name,
        "image_size": config.model.vision.image_size,
        "state": list(robot.model_state),
        "actions": list(robot.model_actions),
        "semantics": list(policy.normalization.semantics),
        "poses": {key: [pose._asdict() for pose in poses] for key, poses in robot.poses._asdict().items()},
        "variant": config.model.variant,
        "num_steps": getattr(config.sampler, "num_steps", None),
        "normalization": {
            name: {"scale": scale.tolist(), "offset": offset.tolist()} for name, (scale, offset) in maps.items()
        },
        "programs": {},
    }


def program(
    policy: Policy, size: int, length: int
) -> tuple[Callable[..., Float[Array, "b ah ad"]], dict[str, Array], dict[str, Any]]:
    """A policy's program as a function of weights and inputs by name; those weights; and an example's inputs."""
    sample, weights, observation, noise = policy.program(size, length)
    paths, tree = jax.tree.flatten_with_path(weights)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}
    names = list(named)
    cameras = tuple(observation.images)
    inputs = {f"images/{camera}": observation.images[camera] for camera in cameras}
    inputs |= {name: getattr(observation, name) for name in ("state", "prompt", "prompt_mask")} | {"noise": noise}

    def run(weights: dict[str, Array], inputs: dict[str, Array]) -> Array:
        given = observation._replace(
            images={camera: inputs[f"images/{camera}"] for camera in cameras},
            image_masks={camera: np.ones(size, bool) for camera in cameras},
            state=inputs["state"], prompt=inputs["prompt"], prompt_mask=inputs["prompt_mask"],
        )  # fmt: skip
        return sample(jax.tree.unflatten(tree, [weights[name] for name in names]), given, inputs["noise"])

    return run, named, inputs


def load(folder: str | Path, size: int = 1) -> Callable[[dict[str, np.ndarray]], Float[np.ndarray, "b ah ad"]]:
    """Reads an exported policy back.

    Args:
        folder: what `export` wrote.
        size: number of observations.

    Returns:
        A function of inputs by name, whose prompts have one of the exported lengths, to normalised actions.

    Raises:
        FileNotFoundError: no such folder, or none of that size.
    """
    from safetensors.flax import load_file

    folder = Path(folder)
    if not (folder / "interface.json").is_file():
        raise FileNotFoundError(f"{folder} is no exported policy: it has no interface.json. Write one with: pi0 export")
    programs = {int(path.stem.split("_")[2]): path for path in folder.glob(f"program_{size}_*.stablehlo")}
    if not programs:
        found = sorted({path.stem.split("_")[1] for path in folder.glob("program_*.stablehlo")})
        raise FileNotFoundError(f"{folder} has no program for {size} observations; it has for {', '.join(found)}.")
    calls = {
        length: jax.jit(jax.export.deserialize(bytearray(path.read_bytes())).call) for length, path in programs.items()
    }
    weights: dict[str, Any] = load_file(folder / "weights.safetensors")
    return lambda inputs: np.asarray(calls[inputs["prompt"].shape[1]](weights, inputs))
