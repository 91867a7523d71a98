"""Measurements. Run one with ``python -m benchmarks.NAME``; the committed results are in ``results/``."""
