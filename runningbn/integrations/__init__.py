"""Recalibration in training frameworks. Each module needs its framework; ``import runningbn`` imports none of them."""
