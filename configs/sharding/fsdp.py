"""Weights, optimizer and average are divided over all devices, and gathered a layer at a time (FSDP, ZeRO 3).

Run: pi0 train configs/tabletop.py --sharding configs/sharding/fsdp.py
"""

from pi0_jax.config import MeshConfig

config = MeshConfig(data=1, fsdp=-1)
