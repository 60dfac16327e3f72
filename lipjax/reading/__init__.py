"""From Flax models to networks."""
