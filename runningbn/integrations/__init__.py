"""Recalibration inside the training frameworks of others; each module needs its framework, and nothing here is
imported with ``runningbn``."""
