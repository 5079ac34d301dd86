"""Benchmarks that a user runs on their own card."""
