"""Future-L1's four recipes over a world that a laptop can learn: `foresight study`."""
