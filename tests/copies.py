"""Ways to copy a layer or a model."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn


def saved_and_loaded(model: nn.Module) -> nn.Module:
    """By torch.save and torch.load, the model as a whole."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch.save": saved_and_loaded}
each_copy = pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
