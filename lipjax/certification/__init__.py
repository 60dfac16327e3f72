"""Certificates: what is proven of which example, by which stage, at what risk."""
