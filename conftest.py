"""What pytest does not collect for doctests."""

import importlib.util

# Its functions are compiled by triton, where that exists.
collect_ignore = [] if importlib.util.find_spec("triton") else ["runningbn/kernels/triton_kernels.py"]
