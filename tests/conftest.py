"""Eight CPU devices, a tiny model, and where the reference fixtures are."""

import gc
import importlib.util
import os
import tempfile
from pathlib import Path

# What tests derive from their data, and the programs that they compile, which the tests of all processes share.
_CACHE = tempfile.TemporaryDirectory(prefix="pi0_jax-tests-")
os.environ["PI0_CACHE"] = _CACHE.name
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(_CACHE.name, "xla")))
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "true")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile far more than they compute: eight small devices, little effort on optimising their programs, and each
# compiled in one piece. In up to 32 pieces for as many threads, XLA's default, it takes a fifth more of few cores.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    " --xla_cpu_parallel_codegen_split_count=1",
)

import jax  # noqa: E402  (after the settings)
import numpy as np  # noqa: E402
import pytest  # noqa: E402

# Read when the first device is asked for. Compiling an update takes a third of the time without the fusion emitters;
# later versions and libtpu have no such flag, and XLA ends the process over one that it does not know.
_FLAG = " --xla_cpu_use_fusion_emitters=false"
if jax.__version_info__ < (0, 11) and importlib.util.find_spec("libtpu") is None:
    os.environ["XLA_FLAGS"] = os.environ["XLA_FLAGS"].replace(_FLAG, "") + _FLAG

jax.config.update("jax_numpy_rank_promotion", "raise")

import tests.typecheck  # noqa: E402, F401  (pyproject.toml names it; imported before what it checks)
from pi0_jax.config import ExpertConfig, MeshConfig, ModelConfig, TrainConfig, VisionConfig  # noqa: E402

LONGEST = [
    "training/test_multihost",
    "compare/test_compare",
    "objective/test_goldens",
    "test_configs",
    "convert/test_damage",
    "objective/test_realtime",
    "objective/test_contract",
    "model/test_expert",
    "training/test_loop",
    "test_pi0",
    "inference/test_policy",
    "training/test_step",
    "training/test_low_precision",
    "training/test_microbatches",
    "training/test_partition",
    "training/test_faults",
    "training/test_objectives",
    "training/test_sharding",
    "model/test_fold",
    "test_docs",
    "model/test_heads",
    "evaluate/test_rollout",
    "plan/test_plan",
    "sampler/test_gaussian",
    "parity/test_openpi",
    "convert/test_convert",
    "sampler/test_solver",
    "data/test_your_robot",
]
"""Files that take longest, most of them first: `make test` hands out whole files, and a long one must not come last."""


def pytest_collection_modifyitems(items):
    places = {f"tests/{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.nodeid.split("::")[0], len(places)))


def pytest_collection_finish(session):
    """What has been imported stays: looking through it for garbage again and again takes a twentieth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


def random_weights(run, shapes):
    """Weights of a run as NumPy draws them, which compiles nothing, in place of its network's own initial values."""
    rng = np.random.default_rng(run.config.seed)

    def values(x):
        drawn = (0.1 * rng.standard_normal(x.shape)).astype(x.dtype)
        return jax.make_array_from_callback(x.shape, x.sharding, drawn.__getitem__)

    return jax.tree.map(values, shapes.weights)


def quick_runs(patch: pytest.MonkeyPatch):
    """Has runs of the default mesh train on one of the devices, and from weights that NumPy draws: most of what a run
    of a few updates takes is compiling, for eight devices and of the network's own initial values."""
    from pi0_jax.training import loop

    first_weights, resolve = loop.first_weights, loop.resolve

    def resolve_there(config: TrainConfig):
        return resolve(config, jax.devices()[:1] if config.mesh == MeshConfig() else None)

    def draw(run, shapes):
        if run.config.init_from is not None or run.config.mesh != MeshConfig():
            return first_weights(run, shapes)
        return random_weights(run, shapes)

    patch.setattr(loop, "resolve", resolve_there)
    patch.setattr(loop, "first_weights", draw)


@pytest.fixture(scope="session", autouse=True)
def _quick_runs():
    with pytest.MonkeyPatch.context() as patch:
        quick_runs(patch)
        yield


def tiny_config(variant: str = "pi0", **changes) -> ModelConfig:
    """A model of some twenty thousand parameters with every part in it."""
    defaults = dict(
        variant=variant,
        vision=VisionConfig(width=16, depth=2, mlp_dim=32, num_heads=2, image_size=16, patch_size=8),
        language=ExpertConfig(width=24, mlp_dim=48),
        action=ExpertConfig(width=16, mlp_dim=32),
        depth=2,
        num_heads=4,
        num_kv_heads=1,
        head_dim=8,
        vocab_size=64,
        cameras=("top", "tool"),
        action_dim=5,
        action_horizon=6,
        prompt_length=7,
        dtype="float32",
        remat="none",
    )
    return ModelConfig(**{**defaults, **changes})


def fixtures_root() -> Path:
    """Folder of the reference fixtures, whether it exists or not."""
    default = Path(__file__).parents[2] / "shared" / "fixtures"
    return Path(os.environ.get("PI0_FIXTURES", default)).resolve()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of public datasets as people have them; skips where there is none."""
    default = Path(__file__).parents[2] / "shared" / "real_data"
    root = Path(os.environ.get("PI0_REAL_DATA", default)).resolve()
    if not root.is_dir():
        pytest.skip(f"no public datasets at {root}; set PI0_REAL_DATA to their folder")
    return root


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """The folder of reference fixtures; skips where there is none."""
    root = fixtures_root()
    if not root.is_dir():
        pytest.skip(f"no reference fixtures at {root}; set PI0_FIXTURES to their folder")
    return root


@pytest.fixture(scope="session")
def checkpoint_folder(tmp_path_factory):
    """A run folder with one checkpoint of a tiny tabletop policy with random weights."""
    from tests.policies import save_tiny_checkpoint

    return save_tiny_checkpoint(tmp_path_factory.mktemp("run"))
