"""The embedded simulator: a language-conditioned tabletop that needs no GPU, no display and no GL.

Importing this package registers `pi0_jax/Tabletop-v0` with Gymnasium. `tasks` is plain numpy and always importable;
everything else needs the optional extra, `pip install pi0_jax[sim]`.
"""

import contextlib

with contextlib.suppress(ImportError):
    import gymnasium

    gymnasium.register(
        id="pi0_jax/Tabletop-v0", entry_point="pi0_jax.evaluate.simulators.tabletop.tabletop:TabletopEnv"
    )
