"""Statistics in files: reading checkpoints without their models, judging and comparing the layers, printing it."""
