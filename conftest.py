"""What holds before anything is imported, and what pytest does not collect for doctests."""

import importlib.util
import os

# Threads that wait for each other sleep: they may be more than there are cores, and then whoever spins is in the way.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Its functions are compiled by triton, where that exists.
collect_ignore = [] if importlib.util.find_spec("triton") else ["runningbn/kernels/triton_kernels.py"]
