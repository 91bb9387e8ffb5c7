"""FSDP, and pairs of neighbours that share examples, each with half of the heads, feed-forward width and vocabulary.

For more devices than the batch has examples. Another number of neighbours: --mesh.tensor 4
Run: pi0 train configs/tabletop.py --sharding configs/sharding/fsdp_tensor.py
"""

from pi0_jax.config import MeshConfig

config = MeshConfig(data=1, fsdp=-1, tensor=2)
