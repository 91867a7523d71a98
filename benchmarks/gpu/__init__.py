"""Everything that a GPU has to prove, in one command: see ``python -m benchmarks.gpu --help``."""
