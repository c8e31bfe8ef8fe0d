"""How long tests wait for what must come: a bound for what hangs, far above what a slow and busy machine needs."""

PATIENCE = 120.0  # seconds
