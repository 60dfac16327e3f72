"""What is bounded: affine layers, activations, and the graph of a network."""
