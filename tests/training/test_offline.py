"""Training and running a policy never ask the network."""

import itertools
import socket

import numpy as np
import pytest

from pi0_jax.config import DataConfig, PolicyConfig, TrainConfig
from pi0_jax.inference.policy import Policy
from pi0_jax.training.inputs import load_inputs
from pi0_jax.training.resolve import resolve
from tests.conftest import tiny_config
from tests.data.conftest import write


class Local(socket.socket):
    """A socket within this machine, as event loops wake themselves with; any other is refused."""

    def __init__(self, family=-1, *arguments, **options):
        if family != socket.AF_UNIX:
            raise AssertionError("a socket to the network was opened")
        super().__init__(family, *arguments, **options)


def refuse(*_, **__):
    raise AssertionError("a name or an address was looked up")


@pytest.fixture
def no_network(monkeypatch):
    monkeypatch.setattr(socket, "socket", Local)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    with pytest.raises(AssertionError):
        socket.socket()


def test_preparing_batches_and_running_a_policy_open_no_socket(no_network, tmp_path, checkpoint_folder):
    model = tiny_config("pi0", cameras=("top",), action_dim=8, vocab_size=512, prompt_length=16)
    data = DataConfig(str(write(tmp_path / "data")), validation_share=0.3)
    config = TrainConfig(policy=PolicyConfig(robot="tabletop", model=model), data=data, batch_size=8)
    inputs = load_inputs(resolve(config))
    assert len(list(itertools.islice(inputs.loader, 3))) == 3
    assert inputs.validation is not None
    assert len(list(inputs.validation())) >= 1
    policy = Policy.load(checkpoint_folder)
    assert np.isfinite(policy.infer(policy.robot.example())).all()
