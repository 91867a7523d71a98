"""Centred weights: the layers, what feeds what, and the functions that put them in and take them out."""
