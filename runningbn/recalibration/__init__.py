"""Statistics recomputed from data: passes over batches and processes, what the layers see in them, and the report."""
