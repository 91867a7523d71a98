"""Networks pretrained on half of the garment classes, to be fine-tuned on the others, in the same or another domain.

One network per seed is trained with nn.BatchNorm2d, batches of 64 and AdamW, and stored in a cache file.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from . import fashion
from .networks import Network, Site, build_stack, with_relu
from .results import SHUFFLED
from .tasks import Data, Part, schedule
from .train import RatedOptimizer, train

KNOWN = 5  # the classes below are pretrained on
EPOCHS, BATCH, RATE = 2, 64, 0.003

State = dict[str, Tensor]


def new_domain(change: Callable[[Tensor], Tensor] | None, batches: str) -> Data:
    """The other classes, changed images in [0, 1], standardised as those that were pretrained on."""
    return _new_domain(change, fashion.folder())


@cache
def _new_domain(change: Callable[[Tensor], Tensor] | None, where: Path) -> Data:
    raw = fashion.raw_garments()
    mean, std = raw.train.inputs.mean(), raw.train.inputs.std()
    parts = [_of_classes(part, part.classes >= KNOWN) for part in raw]
    changed = [part.inputs if change is None else change(part.inputs) for part in parts]
    return Data(*(p._replace(inputs=(inputs - mean) / std) for p, inputs in zip(parts, changed, strict=True)))


def _of_classes(part: Part, chosen: Tensor) -> Part:
    return Part(*(tensor[chosen] for tensor in part))


def batch_norm(site: Site) -> nn.Module:
    """What the nets are pretrained with."""
    return with_relu(nn.BatchNorm2d(site.models * site.channels), site)


def pretrained_stack(network: Network, seeds: Sequence[int], copies: int) -> nn.Module:
    """The pretrained net of each seed, all that `copies` times, with classifiers that know nothing yet."""
    stack = build_stack(network, batch_norm, seeds, copies)
    states = [pretrained(network, seed) for seed in seeds] * copies
    head = f"{len(stack) - 1}."
    with torch.no_grad():
        for name, tensor in stack.state_dict().items():
            if not name.startswith(head):
                tensors = [state[name] for state in states]
                tensor.copy_(torch.cat(tensors) if tensor.dim() else tensors[0])
    return stack


def pretrained(network: Network, seed: int) -> State:
    """The state of one net; trained where the cache does not have it."""
    net = build_stack(network, batch_norm, (seed,), 1)
    garments = fashion.garments().train
    known = _of_classes(garments, garments.classes < KNOWN)
    path = cache_folder() / f"pretrained-{_fingerprint(net, known, seed)}.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
    batches = schedule(known.classes, BATCH, SHUFFLED, EPOCHS * len(known.classes), seed).unsqueeze(1)
    train(net, RatedOptimizer("AdamW", net, torch.tensor([RATE])), known, batches, copies=1)
    _store(path, net.state_dict())
    return net.state_dict()


def _fingerprint(net: nn.Module, part: Part, seed: int) -> str:
    """Of everything that the trained net depends on."""
    found = hashlib.sha256(repr((EPOCHS, BATCH, RATE, seed, torch.__version__, str(net))).encode())
    for tensor in (*net.state_dict().values(), *part):
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def cache_folder() -> Path:
    """Of this benchmark, in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "runningbn-bench"


def _store(path: Path, state: State) -> None:
    """As a whole or not at all: another process may do the same at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        torch.save(state, file)
    os.replace(file.name, path)
