"""What runs on a robot: a client of the policy server, and an executor that sends actions at a steady rate.

    from pi0_client.client import Client
    from pi0_client.executor import Executor
    from pi0_client.player import real_time

It needs numpy, msgpack and websockets. `pi0_jax` uses these modules too, for its server and for simulated latency.
"""
