"""Trains on several hosts of a Ray cluster, one process on each:

    ray job submit --working-dir . -- python launch/ray_train.py --hosts 2 --gpus 8 configs/mine.py --run-dir runs/mine

What follows --hosts and --gpus (0: CPUs alone) goes to `pi0 train`. The folder of the run and the demonstrations have
to be on a disk that all hosts share. `ray job stop` makes all processes save their state and end.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading

import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy


@ray.remote(max_concurrency=2)
class Host:
    """One process of the run, in an actor on its host."""

    def address(self) -> str:
        """Where the others find this one: its host and a free port there."""
        with socket.socket() as free:
            free.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"

    def train(self, coordinator: str, count: int, index: int, args: list[str]) -> int:
        """Runs `pi0 train` and returns its exit code."""
        joined = {"JAX_COORDINATOR_ADDRESS": coordinator, "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(index)}
        self.process = subprocess.Popen([sys.executable, "train.py", *args], env=os.environ | joined)
        return self.process.wait()

    def stop(self) -> None:
        """Asks the process to save and end; it tells the others."""
        self.process.send_signal(signal.SIGTERM)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, required=True)
    parser.add_argument("--gpus", type=int, default=0, help="of each host")
    parser.add_argument("--cpus", type=int, default=1, help="of each host")
    parser.add_argument("--together", action="store_true", help="allow several processes on one host")
    options, args = parser.parse_known_args()

    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    ray.init(log_to_driver=True)
    strategy = "PACK" if options.together else "STRICT_SPREAD"
    group = placement_group([{"CPU": options.cpus, "GPU": options.gpus}] * options.hosts, strategy=strategy)
    ray.get(group.ready())
    hosts = [
        Host.options(
            num_cpus=options.cpus, num_gpus=options.gpus,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
        ).remote()
        for index in range(options.hosts)
    ]  # fmt: skip
    coordinator = ray.get(hosts[0].address.remote())
    runs = [host.train.remote(coordinator, len(hosts), index, args) for index, host in enumerate(hosts)]
    left = runs
    while left:
        _, left = ray.wait(left, num_returns=len(left), timeout=1.0)
        if stopped.is_set():
            stopped.clear()
            ray.get(hosts[0].stop.remote())
    return max(abs(code) for code in ray.get(runs))


if __name__ == "__main__":
    sys.exit(main())
