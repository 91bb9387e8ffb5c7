"""Eight CPU devices, a tiny model, and where the reference fixtures are."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")  # what a test compiles is nobody's to find
# Tests compile far more than they compute: eight small devices, and little effort on optimising their programs.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0")

import importlib.util
import tempfile
from pathlib import Path

import jax
import pytest

_CACHE = tempfile.TemporaryDirectory(prefix="pi0_jax-tests-")
os.environ["PI0_CACHE"] = _CACHE.name  # what a test derives from its data goes with it

# Read when the first device is asked for. Compiling an update takes a third of the time without the fusion emitters;
# later versions and libtpu have no such flag, and XLA ends the process over one that it does not know.
if jax.__version_info__ < (0, 11) and importlib.util.find_spec("libtpu") is None:
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

jax.config.update("jax_numpy_rank_promotion", "raise")

import tests.typecheck  # noqa: E402, F401  (pyproject.toml names it; imported before what it checks)
from pi0_jax.config import ExpertConfig, ModelConfig, VisionConfig  # noqa: E402  (after the flags)


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
