"""The layers: what they compute, their buffers and their state dicts."""
