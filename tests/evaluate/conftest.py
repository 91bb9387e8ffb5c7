import pytest

from tests.policies import save_tiny_checkpoint


@pytest.fixture(scope="session")
def checkpoint_folder(tmp_path_factory):
    """A run folder with one checkpoint of a tiny tabletop policy with random weights."""
    return save_tiny_checkpoint(tmp_path_factory.mktemp("run"))
