"""Mathematics of conditional flow matching. A velocity is any function of (x, t); nothing here knows a network."""
