"""FSDP within each slice (of a TPU, or a group of GPU nodes), and replicas across them: only gradients cross.

Another number of slices than two: --mesh.slices 4
Run: pi0 train configs/tabletop.py --sharding configs/sharding/multi_slice.py
"""

from pi0_jax.config import MeshConfig

config = MeshConfig(slices=2, data=1, fsdp=-1)
