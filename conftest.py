"""What pytest does not collect for doctests: modules whose packages are not installed."""

import importlib.util

# Its functions are compiled by triton.
collect_ignore = [] if importlib.util.find_spec("triton") else ["runningbn/kernels/triton_kernels.py"]
collect_ignore += [
    f"runningbn/integrations/{framework}.py"
    for framework in ("lightning", "transformers", "ignite", "fastai")
    if not importlib.util.find_spec(framework)
]
