"""All tests and measurements on a GPU in one command: see ``python -m benchmarks.gpu --help``."""
