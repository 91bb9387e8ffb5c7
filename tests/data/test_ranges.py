"""Files of ranges, as openpi's for DROID: training samples what they keep, and what does not fit is explained."""

import json

import numpy as np
import pytest

pytest.importorskip("tensorflow_datasets")

from pi0_jax.config import DataConfig, DatasetConfig
from pi0_jax.data.loader import learnable_frames
from pi0_jax.data.mixture import open_dataset
from pi0_jax.errors import UserError
from tests.data.formats import RLDS_KEYS, write_rlds

RANGES = {
    "/raw--/raw/success/0.h5": [[0, 3], [5, 100]],  # of 9 frames
    "/raw--/raw/failure/3.h5": [[0, -9]],  # a range of ten frames, the last ten taken away
    "/raw--/raw/success/4.h5": [[-2, 2]],  # of 7
    "/raw--/elsewhere.h5": [[0, 5]],
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Episodes 0, 2, 4, 1, 3 of 9, 12, 7, 5 and 1 frames."""
    return write_rlds(tmp_path_factory.mktemp("ranges"))


def opened(root, config, path, **data):
    dataset = DatasetConfig(str(root), keys=RLDS_KEYS, sample_ranges=str(path))
    return open_dataset(dataset, DataConfig(**data), config.policy)


def test_training_samples_the_frames_of_the_ranges(root, config, tmp_path, caplog):
    caplog.set_level("INFO")
    path = tmp_path / "ranges.json"
    path.write_text(json.dumps(RANGES))
    dataset = opened(root, config, path)
    kept = [0, 1, 2, 5, 6, 7, 8, 21, 22]
    assert dataset.sampled is not None
    assert dataset.sampled.tolist() == kept
    assert "ranges.json keeps 26 % of the frames, and knows 3 of 5 episodes" in caplog.text
    valid = np.flatnonzero(dataset.source.columns("valid")[:, 0] > 0)
    assert learnable_frames(dataset.source, dataset.training, dataset.sampled).tolist() == sorted(
        {*kept} & {*valid.tolist()}
    )
    some = learnable_frames(dataset.source, np.array([0]), dataset.sampled)
    assert some.tolist() == [frame for frame in kept[:7] if frame in valid]


def test_files_that_do_not_fit_are_explained(root, config, tmp_path):
    path = tmp_path / "ranges.json"
    path.write_text(json.dumps({"gs://elsewhere--x.h5": [[0, 5]]}))
    with pytest.raises(
        UserError, match=r"of its 5 recordings 0 are in the file\. The first is '/raw--/raw/success/0\.h5'"
    ):
        opened(root, config, path)
    path.write_text(json.dumps({"/raw--/raw/success/0.h5": 3}))
    with pytest.raises(UserError, match=r"not of the form \{recording: \[\[first, end\], \.\.\.\]\}"):
        opened(root, config, path)
    with pytest.raises(FileNotFoundError, match="expected ranges of frames"):
        opened(root, config, tmp_path / "nowhere.json")


def test_datasets_that_do_not_name_their_recordings_are_refused(dataset, config, tmp_path):
    path = tmp_path / "ranges.json"
    path.write_text(json.dumps(RANGES))
    with pytest.raises(UserError, match="does not name its recordings"):
        open_dataset(DatasetConfig(str(dataset.root), sample_ranges=str(path)), DataConfig(), config.policy)
