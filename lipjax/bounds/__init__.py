"""What follows: one pass of a region through a network, worst-case margins, and the dual."""
