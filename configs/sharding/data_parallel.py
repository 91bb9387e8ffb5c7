"""Each device holds everything and sees its part of the batch: the fastest way where everything fits.

Run: pi0 train configs/tabletop.py --sharding configs/sharding/data_parallel.py
"""

from pi0_jax.config import MeshConfig

config = MeshConfig(data=-1)
