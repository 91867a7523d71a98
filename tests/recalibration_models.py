"""Models to recalibrate, what their layers see computed apart from the library, and all that a model consists of."""

import copy
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from cases import noise
from models import BatchNormAct2d, pretrained
from steps import train
from torch import Tensor, nn

from runningbn import RunningBatchNorm, batchnormify, update_bn_stats

BatchNorm = nn.modules.batchnorm._BatchNorm
SIZES = (2, 2, 4, 8, 16, 32, 64)  # the batches of fvcore's own test


class DroppingBatchNormAct2d(BatchNormAct2d):
    """With a dropout that would be seen if recalibration turned it on."""

    def __init__(self, num_features: int, **kwargs: Any) -> None:
        super().__init__(num_features, drop_layer=nn.Dropout, **kwargs)


class ChannelsLastBatchNorm(nn.BatchNorm1d):
    """For (N, L, C): permutes to what its base expects and back."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class OwnArithmetic(nn.BatchNorm2d):
    """Computes by itself and updates its running buffers in place, or by giving them new tensors."""

    rebinds = False

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        if self.training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
            n = x.numel() / x.shape[1]
            with torch.no_grad():
                new_mean = torch.lerp(self.running_mean, mean, self.momentum)
                new_var = torch.lerp(self.running_var, var * (n / (n - 1)), self.momentum)
                if self.rebinds:
                    self.running_mean, self.running_var = new_mean, new_var
                else:
                    self.running_mean.copy_(new_mean)
                    self.running_var.copy_(new_var)
        mean, var, weight, bias = (t[None, :, None, None] for t in (mean, var, self.weight, self.bias))
        return (x - mean) * (var + self.eps).rsqrt() * weight + bias


class Rebinding(OwnArithmetic):
    rebinds = True


def mlp(depth: int = 3, width: int = 8, inputs: int = 5, bias: bool = True, **kwargs: Any) -> nn.Sequential:
    """Linear, BatchNorm and ReLU, `depth` times; statistics that no data gave."""
    torch.manual_seed(0)
    blocks: list[nn.Module] = []
    for i in range(depth):
        blocks += [nn.Linear(width if i else inputs, width, bias=bias), nn.BatchNorm1d(width), nn.ReLU()]
    return pretrained(nn.Sequential(*blocks)).to(**kwargs) if kwargs else pretrained(nn.Sequential(*blocks))


def net() -> nn.Sequential:
    """Two layers for `pictures`."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))


class Residual(nn.Module):
    """A small residual convolutional net with dropout."""

    def __init__(self, width: int = 4, blocks: int = 1) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
            )
            for _ in range(blocks)
        )
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(width, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = (x + block(x)).relu()
        return self.head(x.mean((2, 3)))


def residual(**kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return pretrained(Residual(**kwargs))


def rows(n: int, features: int = 5, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """(n, features), of which each feature has another mean and spread."""
    places = torch.arange(features)
    return (noise((n, features), seed) * (1 + places / 2) + places - 1).to(dtype)


def pictures(n: int, size: int = 5, seed: int = 0) -> Tensor:
    return rows(n * size * size, 3, seed).reshape(n, size, size, 3).permute(0, 3, 1, 2).contiguous()


def picture_batches(n: int = 4) -> list[Tensor]:
    return [pictures(4, seed=seed) for seed in range(n)]


def own_arithmetic(layer=OwnArithmetic) -> nn.Module:
    torch.manual_seed(0)
    return pretrained(nn.Sequential(nn.Conv2d(3, 4, 1), layer(4), nn.Dropout(0.5), nn.BatchNorm2d(4)))


def mixed_flags() -> nn.Module:
    """Training mode but for one frozen layer; hooks of the user's on two."""
    model = residual().train()
    model.stem[1].eval()
    model.blocks[0][1].register_forward_hook(lambda *_: None)
    model.blocks[0][1].register_forward_pre_hook(lambda *_: None)
    return model


def ours(to: str) -> nn.Module:
    return train(batchnormify(residual(), to), [pictures(4, seed=8)])


MODELS: dict[str, Callable[[], nn.Module]] = {
    "training": lambda: residual().train(),
    "evaluation": lambda: residual().eval(),
    "mixed flags": mixed_flags,
    "running": lambda: ours("running"),
    "precise": lambda: ours("precise"),
    "own arithmetic": own_arithmetic,
    "rebinding": lambda: own_arithmetic(Rebinding),
}
each_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
each_procedure = pytest.mark.parametrize("normalize", ["batch", "population"])


# -------------------------------------------------------------------------------------- computed apart from the library


def in_rows(x: Tensor) -> Tensor:
    """(N, C, *) as (elements, C), float64."""
    return x.detach().double().movedim(1, -1).reshape(-1, x.shape[1])


def moments(x: Tensor, correction: int = 1) -> tuple[Tensor, Tensor]:
    return x.mean(0), x.var(0, correction=correction)


def normalised(layer: nn.Module, x: Tensor) -> Tensor:
    """x in float64 by its own batch, as nn.BatchNorm in training."""
    mean, var = moments(in_rows(x), correction=0)
    weight = torch.ones_like(mean) if layer.weight is None else layer.weight
    bias = torch.zeros_like(mean) if layer.bias is None else layer.bias
    y = (in_rows(x) - mean) / (var + layer.eps).sqrt() * weight.double() + bias.double()
    return y.reshape(x.movedim(1, -1).shape).movedim(-1, 1)


def inputs_by_batch(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, list[Tensor]]:
    """What every BatchNorm layer gets in float64, each (elements, C), call by call, all layers normalising by batches.

    Of a copy of the model in evaluation mode, of which the layers are nn.BatchNorm or compute as they do.
    """
    twin = copy.deepcopy(model).double().eval()
    seen: dict[str, list[Tensor]] = {}
    for name, module in twin.named_modules():
        if isinstance(module, BatchNorm):
            seen[name] = []

            def forward(x: Tensor, name: str = name, layer: nn.Module = module) -> Tensor:
                seen[name].append(in_rows(x))
                return normalised(layer, x)

            module.forward = forward
    with torch.no_grad():
        for x in batches:
            twin(x.double())
    return seen


def reference(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and variance, correction 1, over all that each layer gets when the layers normalise by batches."""
    return {name: moments(torch.cat(parts)) for name, parts in inputs_by_batch(model, batches).items()}


def inputs_in_evaluation(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """What every BatchNorm layer gets in evaluation, (elements, C), float64; the model itself computes."""
    seen: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(in_rows(args[0])))
        for name, module in model.named_modules()
        if isinstance(module, BatchNorm)
    ]
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    with torch.no_grad():
        for x in batches:
            model(x)
    for module, training in flags:
        module.training = training
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def shown(model: nn.Module, batches: list[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """The moments of what each BatchNorm layer gets in evaluation, of a copy, correction 1."""
    twin = copy.deepcopy(model).eval()
    seen: dict[str, list[Tensor]] = {}
    for name, layer in twin.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_pre_hook(lambda _, args, n=name: seen.setdefault(n, []).append(in_rows(args[0])))
    with torch.no_grad():
        for x in batches:
            twin(x)
    return {name: moments(torch.cat(parts)) for name, parts in seen.items()}


def statistics(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Copies of running_mean and running_var by layer, float64."""
    return {
        name: (module.running_mean.double().clone(), module.running_var.double().clone())
        for name, module in model.named_modules()
        if isinstance(module, BatchNorm) and module.running_mean is not None
    }


def assert_statistics(
    model: nn.Module, expected: dict[str, tuple[Tensor, Tensor]], tolerance: float = 1e-5, only: Sequence[str] = ()
) -> None:
    """Means within the tolerance in std, variances relative to themselves."""
    found = statistics(model)
    assert found.keys() == expected.keys()
    for name in only or expected:
        (mean, var), (true_mean, true_var) = found[name], expected[name]
        assert ((mean - true_mean).abs() <= tolerance * true_var.sqrt()).all(), (name, mean, true_mean)
        assert ((var - true_var).abs() <= tolerance * true_var).all(), (name, var, true_var)


# -------------------------------------------------------------------------------------------------- all that a model is


def everything(model: nn.Module, but: Callable[[str], bool] = lambda name: False) -> dict[str, Any]:
    """All that could be changed behind a user's back: tensors and where they lie, flags, attributes, hooks.

    Args:
        model: of which.
        but: for names of tensors whose values may differ; not their places.
    """
    found: dict[str, Any] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found[f"place of {name}"] = id(tensor), tensor.data_ptr(), tensor.dtype, tensor.requires_grad, tensor.shape
        if not but(name):
            found[f"value of {name}"] = _bits(tensor.detach())
        if tensor.grad is not None:
            found[f"gradient of {name}"] = tensor.grad.clone()
    for name, module in model.named_modules():
        attributes = vars(module)
        found[f"attributes of {name}"] = list(attributes)
        found[f"flags of {name}"] = module.training, getattr(module, "momentum", ...), type(module)
        found[f"hooks of {name}"] = {k: list(v.items()) for k, v in attributes.items() if "hooks" in k and v}
        found[f"state keys of {name}"] = list(module.state_dict())
    return found


def _bits(tensor: Tensor) -> Tensor:
    """A copy that is equal to another where their bits are, NaN included."""
    return tensor.reshape(-1).contiguous().clone().view(torch.uint8)


def random_states() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state()
    return bytes(torch.get_rng_state().tolist()), random.getstate(), name, keys.tobytes(), rest


def assert_same(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        same = torch.equal(actual[name], value) if isinstance(value, Tensor) else actual[name] == value
        assert same, f"{name}: {value} became {actual[name]}"


def is_statistic(name: str) -> bool:
    return name.rpartition(".")[2] in ("running_mean", "running_var")


def is_statistic_of_ours(name: str) -> bool:
    return is_statistic(name) or name.rpartition(".")[2] in ("sums", "sqrs", "shift", "count", "debias")


def draw_everywhere() -> None:
    torch.rand(3), random.random(), np.random.rand()


def recalibrated(model: nn.Module, batches: Iterable[Any], **kwargs: Any) -> nn.Module:
    update_bn_stats(model, batches, None, **kwargs)
    return model


def correction_of(layer: nn.Module) -> int:
    return 0 if isinstance(layer, RunningBatchNorm) else 1
