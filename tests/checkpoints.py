"""A small model of torch's layers, and files of what is saved of one."""

from pathlib import Path
from typing import Any

import torch
from models import pretrained
from torch import nn

C = 8


def small_net(**options: Any) -> nn.Module:
    return pretrained(nn.Sequential(nn.Conv2d(3, C, 3), nn.BatchNorm2d(C, **options), nn.Sequential(nn.BatchNorm2d(C))))


def saved(folder: Path, contents: Any, name: str = "checkpoint.pt", **options: Any) -> Path:
    torch.save(contents, folder / name, **options)
    return folder / name
