"""Training through bounds: losses, methods, the step and its state."""
