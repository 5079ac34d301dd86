"""Rescaling the channels of a block without changing its function: where that is possible, and doing it."""
