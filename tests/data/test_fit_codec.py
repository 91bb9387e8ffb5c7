"""`pi0 data fast`: codecs are fitted to chunks as training has them, and say what they do to them."""

import numpy as np
import pytest

from pi0_jax.data.fast import FastCodec, hold
from pi0_jax.data.loader import valid_steps
from pi0_jax.data.normalization import Normalization, normalize_values
from pi0_jax.data.tools.fit_codec import normalized_chunks
from tests.data.stats import compute_stats
from tests.data.test_commands import run  # noqa: F401  (a fixture)
from tests.data.test_loader import ABSOLUTE, opened

pytest.importorskip("tokenizers")


def test_chunks_are_normalised_and_end_with_what_is_to_be_learnt(dataset, config):
    stats = compute_stats(dataset)
    groups = {"tabletop": Normalization(stats, ABSOLUTE)}
    (chunks,) = normalized_chunks([opened(dataset)], groups, config.policy, 1000, progress=False)
    rows = np.flatnonzero(dataset.columns("valid")[:, 0] > 0)
    assert len(chunks) == len(rows)  # all there are
    actions, steps = dataset.chunk(rows, 4)
    steps &= valid_steps(dataset, rows, 4)
    expected = normalize_values(actions, stats["actions"], "zscore")
    np.testing.assert_allclose(chunks[steps], expected[steps], rtol=1e-6)
    after = ~steps[:, 1:]
    np.testing.assert_array_equal(chunks[:, 1:][after], chunks[:, :-1][after])
    (few,) = normalized_chunks([opened(dataset)], groups, config.policy, 5, progress=False)
    assert (few[:, None] == chunks).all((2, 3)).any(1).all()


def test_an_action_that_is_not_to_be_learnt_is_replaced_by_the_last_that_is():
    chunk, valid = np.arange(8.0).reshape(2, 4, 1), np.array([[1, 1, 0, 1], [0, 0, 0, 0]], bool)
    assert hold(chunk, valid)[..., 0].tolist() == [[0, 1, 1, 1], [4, 4, 4, 4]]


def test_the_command_fits_and_measures(dataset, run, tmp_path):  # noqa: F811
    horizon = ("--policy.model.action-horizon", "4")
    code, printed, err = run("fast", dataset.root, "--output", "codec", "--vocab", "300", *horizon)
    assert code == 0, err
    assert "codes per chunk: mean " in printed
    assert "set data.codec to it" in printed
    codec = FastCodec.load(tmp_path / "codec")
    assert codec.num_codes <= 300
    assert (codec.horizon, codec.dims) == (4, 3)
    rows = [line.split() for line in printed.splitlines() if line.split()[:1] in (["dx"], ["dy"], ["dz"])]
    assert [row[0] for row in rows] == ["dx", "dy", "dz"]
    assert all(0 < float(row[1]) <= float(row[2]) < 0.05 * 4 for row in rows)
    assert run("fast", dataset.root, "--output", "codec")[0] == 1  # exists
    code, again, _ = run("fast", dataset.root, "--codec", "codec", *horizon)
    assert code == 0
    assert "codes per chunk: mean " in again
    assert "wrote" not in again
