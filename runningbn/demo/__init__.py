"""``python -m runningbn demo``: training on handwritten digits with tiny batches."""
