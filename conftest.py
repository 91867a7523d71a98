"""What holds before anything is imported, and what pytest does not collect for doctests."""

import importlib.util
import os

# Threads that wait for each other sleep: they may be more than there are cores, and then whoever spins is in the way.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

collect_ignore = [
    f"runningbn/kernels/triton_{part}.py"
    for part in ("backward", "forward", "kernels", "state", "tiles", "updates", "vectors")  # compiled by triton
    if not importlib.util.find_spec("triton")
]
collect_ignore += [
    f"runningbn/integrations/{framework}.py"
    for framework in ("lightning", "transformers", "ignite", "fastai")
    if not importlib.util.find_spec(framework)
]
