"""Whether a model evaluates badly because of its BatchNorm layers: `diagnose`, and what it says."""
