"""Centred weights: the layers, the detection of the layers to centre, and the functions that convert a model."""
