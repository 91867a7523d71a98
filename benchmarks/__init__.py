"""Measurements, each runnable with ``python -m benchmarks.NAME``; their committed results are in ``results/``."""
