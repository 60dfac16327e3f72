"""What is bounded: affine layers, activations, and the steps of a network."""
