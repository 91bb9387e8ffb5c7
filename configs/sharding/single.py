"""One device. Run: pi0 train configs/tabletop.py --sharding configs/sharding/single.py"""

from pi0_jax.config import MeshConfig

config = MeshConfig(data=1)
