"""Rotations that cost nothing at run time: the matrices, the roles that a block gives its layers, and the run."""
