"""Recompute BatchNorm statistics from data: passes over the data, estimators, processes and reports."""
