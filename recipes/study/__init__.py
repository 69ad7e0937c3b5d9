"""Systems that think in latents, over a world that a laptop can learn: `foresight study`."""
