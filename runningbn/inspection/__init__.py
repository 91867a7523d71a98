"""Statistics in files: read checkpoints without the code of their models, check and compare the layers, print."""
