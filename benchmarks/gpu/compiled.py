"""The networks with torch.compile on a GPU, before and after `batchnormify`.

Run by ``python -m benchmarks.gpu``; see there. Compiling a network takes tens of seconds. So each variant has its own
row and its own time, and the rows are in order of importance. The variants of a network are measured one after the
other.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch

from .models import Case, timed, trainings
from .networks import NETWORKS, SMALL
from .part import Work

# The mode of torch.compile, and the batch sizes it is tried with.
MODE = "default"


def cases(dry_run: bool) -> list[tuple[Case, str]]:
    """With the variant of each: the layers that are to be replaced, then the others."""
    names, batches = (list(SMALL), (2,)) if dry_run else (list(NETWORKS), (2, 1, 32, 8))
    # The first network at its smallest batches before all else.
    order = [(names[0], batch) for batch in batches[:2]]
    order += [(name, batch) for batch in batches for name in names if (name, batch) not in order]
    variants = ("running",) if dry_run else ("nn.BatchNorm2d", "running", "precise")
    return [(Case(name, batch, "compiled"), variant) for name, batch in order for variant in variants]


def measure(case: Case, variant: str, dry_run: bool) -> dict[str, Any]:
    """A row: the first step with its compilation, then the time of a step."""
    torch._dynamo.reset()
    device = "cpu" if dry_run else "cuda"
    training = trainings(case, device)[variant]
    training.call = torch.compile(training.model, **({"backend": "aot_eager"} if dry_run else {"mode": MODE}))
    begin = time.perf_counter()
    loss = float(training.step())
    seconds = time.perf_counter() - begin
    found = timed({variant: training.step}, device, 1.0)
    kept = ("rounds", "milliseconds", "host milliseconds", "launches")
    return {
        **case._asdict(), "variant": variant, "first loss": loss, "compiled in seconds": round(seconds, 1),
        **{name: found[name] for name in kept},
    }  # fmt: skip


def main() -> int:
    """Measure what there is time for; the exit status."""
    work = Work(__doc__)
    return work.each(cases(work.dry_run), lambda case: measure(*case, work.dry_run))


if __name__ == "__main__":
    sys.exit(main())
