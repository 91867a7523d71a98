"""`diagnose`: test whether a model evaluates badly because of its BatchNorm layers."""
