"""Against big_vision's own numbers for PaliGemma: image tokens and next-token logits; float32."""

import jax
import pytest

from tests.conftest import fixtures_root
from tests.parity.common import Case, folders, relative_error


@pytest.fixture(scope="module", params=folders("bigvision_*", "paligemma"), ids=lambda folder: folder and folder.name)
def case(request):
    if request.param is None:
        pytest.skip(f"no bigvision_* folders in {fixtures_root()}; set PI0_FIXTURES to where they are")
    (file,) = (path.name for path in request.param.glob("*.npz") if path.name != "io.npz")
    with jax.default_matmul_precision("highest"):
        yield Case(request.param, file)


def test_image_tokens(case):
    tokens, _ = case.apply(case.observation, method="embed_prefix")
    expected = case.io["image_tokens"]
    assert relative_error(tokens[:, : expected.shape[1]], expected) <= 1e-5


def test_next_token_logits(case):
    logits = case.logits(case.io["mask_ar"], count_masked=False, drop_last=0)
    assert relative_error(logits, case.io["logits"]) <= 1e-5
