"""What runs on a robot: a client of the policy server, and an executor that sends actions at a steady rate.

It needs numpy, msgpack and websockets. `pi0_jax` uses these modules too, for its server and for simulated latency.
"""
