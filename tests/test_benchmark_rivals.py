"""The rivals of the accuracy benchmark are their papers' formulas, and a stack of them is its models."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from benchmarks.accuracy import networks, rivals, tasks, train
from benchmarks.accuracy.networks import Site

FACTORIES = {
    "MABN": rivals.mabn,
    "FRN": rivals.frn,
    "EvoNorm": rivals.evonorm,
    "Online Normalization": lambda steps: rivals.online_norm(steps, 0.9, 0.8),
}
each_factory = pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
each_transform = pytest.mark.parametrize("transform", [rivals.center_weights_of, rivals.standardize_weights])


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomised(layer: nn.Module) -> nn.Module:
    """The layer in float64, with other parameters than it begins with."""
    layer = layer.double()
    with torch.no_grad():
        for number, parameter in enumerate(layer.parameters()):
            parameter.add_(0.3 * noise(*parameter.shape, seed=number + 50))
    return layer


def step(layer: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """Output and gradients of x and of the parameters."""
    x = x.clone().requires_grad_()
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], dy)]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def buffers(layer: nn.Module) -> list[Tensor]:
    return [buffer.clone() for buffer in layer.buffers()]


# --------------------------------------------------------------------------------------------------------------- MABN


def mabn_channel(
    batches: list[Tensor], gradients: list[Tensor], gamma: float, beta: float, steps: int
) -> tuple[list[list[Tensor]], float, list[float]]:
    """Every step of a run on one channel: [y, dx, dγ, dβ]; χ̂² at the end, and every r before it is clipped."""
    eps, a = 1e-5, min(max(0.02, 20 / steps), 0.1)
    squares, psis, found, ratios = [], [], [], []
    moving = (batches[0] ** 2).mean().item()
    for t, (x, dy) in enumerate(zip(batches, gradients, strict=True), start=1):
        m = max(1, 32 // len(x))
        alone = t <= m or t < steps / 100
        squares.append((x**2).mean().item())
        square = squares[-1] if alone else sum(squares[-m:]) / m
        sigma = math.sqrt(square + eps)
        ratios.append(sigma / math.sqrt(moving + eps))
        r = min(max(ratios[-1], 0.2), 5) if t > steps / 10 else 1
        moving += a * (square - moving)
        z, g = x / sigma, dy * gamma * r
        psis.append((g * z).mean().item())
        psi = psis[-1] if alone else sum(psis[-m:]) / m
        found.append([gamma * r * z + beta, (g - z * psi) / sigma, (dy * r * z).sum(), dy.sum()])
    return found, moving, ratios


@pytest.mark.parametrize("shape", [(4, 3, 3, 2), (16, 3, 1), (1, 3, 6), (40, 3, 2)])
@pytest.mark.parametrize("steps", [100, 250, 4000])
def test_mabn_is_its_formula(shape, steps):
    layer = randomised(rivals.MABN(3, steps))
    # The scale falls and grows again, for r to meet both of its limits.
    scales = [300 if t < 4 else 1 if t < 50 else 30_000 for t in range(60)]
    batches = [noise(*shape, seed=t) * scale + 0.5 for t, scale in enumerate(scales)]
    gradients = [noise(*shape, seed=t + 1000) + 0.2 for t in range(60)]
    ours = [step(layer, x, dy) for x, dy in zip(batches, gradients, strict=True)]
    for c in range(3):
        channel = [[t[:, c] for t in tensors] for tensors in (batches, gradients)]
        expected, moving, ratios = mabn_channel(*channel, layer.weight[c].item(), layer.bias[c].item(), steps)
        for (y, dx, dweight, dbias), theirs in zip(ours, expected, strict=True):
            assert_same([y[:, c], dx[:, c], dweight[c], dbias[c]], theirs)
        assert layer.mean_square[c].item() == pytest.approx(moving)
        if steps < 4000:
            late = ratios[steps // 10 :]
            assert min(late) < 1 / rivals.MABN.R_MAX < rivals.MABN.R_MAX < max(late)


def test_mabn_without_averages_is_differentiated_as_autograd_does():
    layer = randomised(rivals.MABN(3, 1000))
    x, dy = noise(32, 3, 4), noise(32, 3, 4, seed=1)
    ours = step(layer, x, dy)
    x.requires_grad_()
    weight, bias = (parameter.detach().clone().requires_grad_() for parameter in layer.parameters())
    rms = ((x**2).mean((0, 2), keepdim=True) + 1e-5).sqrt()
    y = x / rms * weight.view(-1, 1) + bias.view(-1, 1)
    assert_same(ours, [y.detach(), *torch.autograd.grad(y, [x, weight, bias], dy)])


def test_mabn_in_evaluation_has_the_moving_second_moment():
    layer = randomised(rivals.MABN(3, 100))
    for seed in range(20):
        step(layer, noise(2, 3, 5, seed=seed) * (1 + seed), noise(2, 3, 5, seed=seed + 100))
    before = buffers(layer)
    x = noise(2, 3, 5, seed=99)
    rms = (layer.mean_square + 1e-5).sqrt().view(-1, 1)
    torch.testing.assert_close(layer.eval()(x), x / rms * layer.weight.view(-1, 1) + layer.bias.view(-1, 1))
    assert layer.mean_square.min() > 2
    assert_same(buffers(layer), before)


def test_mabn_has_the_settings_of_its_authors_in_a_long_run():
    layer = rivals.MABN(3, 10_000)
    assert layer.momentum == pytest.approx(1 - 0.98)
    assert rivals.MABN(3, 34).momentum == 0.1


# ---------------------------------------------------------------------------------------- Filter Response Normalization


def frn_formula(layer: rivals.FilterResponseNorm, x: Tensor, epsilon: float) -> Tensor:
    y = torch.empty_like(x)
    for n in range(len(x)):
        for c in range(x.shape[1]):
            values = x[n, c]
            nu = math.sqrt((values**2).sum().item() / values.numel() + epsilon)
            y[n, c] = layer.weight[c].item() * values / nu + layer.bias[c].item()
            if layer.threshold is not None:
                y[n, c].clamp_(min=layer.threshold[c].item())
    return y


@pytest.mark.parametrize("activated", [True, False])
@pytest.mark.parametrize("shape", [(3, 4, 3, 2), (3, 4, 5), (3, 4, 1, 1), (3, 4, 1)])
def test_frn_is_its_formula(shape, activated):
    layer = randomised(rivals.FilterResponseNorm(4, activated=activated))
    epsilon = 1e-6 + abs(layer.eps.item()) if math.prod(shape[2:]) == 1 else 1e-6
    x = noise(*shape)
    expected = frn_formula(layer, x, epsilon)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.eval()(x), expected)
    assert torch.autograd.gradcheck(layer, x.clone().requires_grad_())
    assert any(name == "threshold" for name, _ in layer.named_parameters()) == activated


def test_frn_learns_its_epsilon_where_there_is_one_position():
    layer = rivals.FilterResponseNorm(4, activated=False).double()
    assert layer.eps.item() == pytest.approx(1e-4)
    x, dy = noise(3, 4, 1) * 0.01, noise(3, 4, 1, seed=1)
    layer(x).backward(dy)
    # d/dε of x/√(x² + ε) is −½·x/√(x² + ε)³.
    expected = (dy * -0.5 * x / (x**2 + 1e-6 + layer.eps.detach()) ** 1.5).sum()
    torch.testing.assert_close(layer.eps.grad, expected.view(1))
    layer.zero_grad()
    layer(noise(3, 4, 2)).sum().backward()
    assert layer.eps.grad is None


def test_frn_has_gradients_by_the_formula_at_the_threshold():
    layer = randomised(rivals.FilterResponseNorm(4))
    x, dy = noise(3, 4, 5), noise(3, 4, 5, seed=1)
    y = layer(x)
    y.backward(dy)
    at_threshold = y == layer.threshold.view(-1, 1)
    assert 0 < at_threshold.sum() < y.numel()
    torch.testing.assert_close(layer.threshold.grad, (dy * at_threshold).sum((0, 2)))
    torch.testing.assert_close(layer.bias.grad, (dy * ~at_threshold).sum((0, 2)))


# ------------------------------------------------------------------------------------------------------------- EvoNorm


@pytest.mark.parametrize("shape", [(3, 8, 3, 2), (3, 8, 5), (3, 8, 1)])
def test_evonorm_is_its_formula(shape):
    layer = randomised(rivals.EvoNormS0(8, groups=2))
    x = noise(*shape)
    expected = torch.empty_like(x)
    for n in range(len(x)):
        for c in range(8):
            group = x[n, c // 4 * 4 : c // 4 * 4 + 4]
            std = math.sqrt(((group - group.mean()) ** 2).sum().item() / group.numel() + 1e-5)
            gate = 1 / (1 + torch.exp(-layer.gate[c].item() * x[n, c]))
            expected[n, c] = x[n, c] * gate / std * layer.weight[c].item() + layer.bias[c].item()
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.eval()(x), expected)
    assert torch.autograd.gradcheck(layer, x.clone().requires_grad_())


def test_evonorm_without_activation_is_affine():
    layer = randomised(rivals.EvoNormS0(8, groups=2, activated=False))
    x = noise(3, 8, 5)
    torch.testing.assert_close(layer(x), x * layer.weight.view(-1, 1) + layer.bias.view(-1, 1))
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]


@pytest.mark.parametrize(("channels", "groups"), [(8, 2), (16, 4), (32, 8), (64, 8)])
def test_evonorm_has_four_channels_to_a_group_but_eight_groups_at_most(channels, groups):
    assert rivals.evonorm(1)(Site(channels, 3, 2, True)).groups == 3 * groups


# ------------------------------------------------------------------------------------------------ Online Normalization


class OnlineReference:
    """The paper's recurrences, a sample and a channel at a time; layer scaling with its derivative by hand."""

    def __init__(self, layer: rivals.OnlineNorm, alpha: float, alpha_b: float) -> None:
        self.alpha, self.alpha_b, self.models = alpha, alpha_b, layer.models
        self.gamma, self.beta = layer.weight.tolist(), layer.bias.tolist()
        self.mu, self.var, self.error_y, self.error_1 = ([start] * len(self.gamma) for start in (0.0, 1.0, 0.0, 0.0))

    def step(self, x: Tensor, dy: Tensor) -> list[Tensor]:
        z, out, dx, sigma = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x), torch.empty(x.shape[:2])
        sigma = sigma.double()
        dgamma, dbeta = torch.zeros(x.shape[1]).double(), torch.zeros(x.shape[1]).double()
        for n in range(len(x)):
            for c in range(x.shape[1]):
                sigma[n, c] = math.sqrt(self.var[c] + 1e-5)
                z[n, c] = (x[n, c] - self.mu[c]) / sigma[n, c]
                m = x[n, c].mean().item()
                s = ((x[n, c] - m) ** 2).mean().item()
                a = self.alpha
                self.var[c] = a * self.var[c] + (1 - a) * s + a * (1 - a) * (m - self.mu[c]) ** 2
                self.mu[c] = a * self.mu[c] + (1 - a) * m
            y = torch.stack([self.gamma[c] * z[n, c] + self.beta[c] for c in range(x.shape[1])])
            scaled = y.view(self.models, -1)
            scale = [math.sqrt((values**2).mean().item() + 1e-5) for values in scaled]
            scaled = torch.stack([values / one for values, one in zip(scaled, scale, strict=True)])
            out[n] = scaled.view(y.shape)
            d_scaled = dy[n].reshape(self.models, -1)
            dout = [(g - v * (g * v).mean()) / one for g, v, one in zip(d_scaled, scaled, scale, strict=True)]
            dout = torch.stack(dout).view(y.shape)
            for c in range(x.shape[1]):
                dgamma[c] += (dout[c] * z[n, c]).sum()
                dbeta[c] += dout[c].sum()
                h = dout[c] * self.gamma[c] - (1 - self.alpha_b) * self.error_y[c] * z[n, c]
                self.error_y[c] += (h * z[n, c]).mean().item()
                dx[n, c] = h / sigma[n, c] - (1 - self.alpha_b) * self.error_1[c]
                self.error_1[c] += dx[n, c].mean().item()
        return [out, dx, dgamma, dbeta]


@pytest.mark.parametrize("shape", [(3, 4, 3, 2), (5, 4, 1), (1, 4, 6)])
@pytest.mark.parametrize("models", [1, 2])
def test_online_normalization_is_its_recurrences(shape, models):
    layer = randomised(rivals.OnlineNorm(4, models, forward_decay=0.95, backward_decay=0.9))
    reference = OnlineReference(layer, 0.95, 0.9)
    for seed in range(12):
        x, dy = noise(*shape, seed=seed) * 2 + 1, noise(*shape, seed=seed + 100) + 0.5
        assert_same(step(layer, x, dy), reference.step(x, dy))
    state = (reference.mu, reference.var, reference.error_y, reference.error_1)
    assert_same(buffers(layer), [torch.tensor(values, dtype=torch.float64) for values in state])
    assert max(map(abs, reference.error_y + reference.error_1)) > 0.1  # or the backward would be a plain quotient


def test_online_normalization_takes_the_samples_of_a_batch_one_after_another():
    batched, single = (randomised(rivals.OnlineNorm(4)) for _ in range(2))
    for seed in range(5):
        x, dy = noise(4, 4, 3, seed=seed), noise(4, 4, 3, seed=seed + 100)
        y, dx, *_ = step(batched, x, dy)
        parts = [step(single, x[n : n + 1], dy[n : n + 1]) for n in range(4)]
        assert_same([y, dx], [torch.cat([part[i] for part in parts]) for i in range(2)])
    assert (single.forward_decay, single.backward_decay) == (0.999, 0.99)


def test_online_normalization_makes_gradients_orthogonal_in_the_long_run():
    layer = rivals.OnlineNorm(2, forward_decay=0.99, backward_decay=0.95).double()
    sums, plain = torch.zeros(2).double(), torch.zeros(2).double()
    for seed in range(400):
        x, dy = noise(1, 2, 8, seed=seed), noise(1, 2, 8, seed=seed + 1000) + 0.5
        _, dx, *_ = step(layer, x, dy)
        sums += dx.sum((0, 2))
        plain += dy.sum((0, 2))
    # The sum of means of dx is the error itself, which stays bounded: here of size 0.5/(1 − 0.95).
    torch.testing.assert_close(sums / 8, layer.error_1, rtol=1e-9, atol=1e-9)
    assert (sums.abs() < 0.1 * plain.abs()).all()


def test_online_normalization_in_evaluation_has_frozen_statistics():
    layer = randomised(rivals.OnlineNorm(4, models=2, forward_decay=0.9))
    for seed in range(10):
        step(layer, noise(2, 4, 5, seed=seed) * 3 + 1, noise(2, 4, 5, seed=seed + 100))
    before = buffers(layer)
    x = noise(3, 4, 5, seed=99)
    mean, var, weight, bias = (t.view(-1, 1) for t in (layer.mean, layer.var, layer.weight, layer.bias))
    y = ((x - mean) / (var + 1e-5).sqrt() * weight + bias).view(3, 2, -1)
    expected = (y / ((y**2).mean(2, keepdim=True) + 1e-5).sqrt()).view(3, 4, 5)
    torch.testing.assert_close(layer.eval()(x), expected)
    assert_same(buffers(layer), before)


# -------------------------------------------------------------------------------------------------------------- stacks


@each_factory
@pytest.mark.parametrize("shape", [(3, 8, 3, 2), (2, 8, 5), (4, 8, 1)])
@pytest.mark.parametrize("activated", [True, False])
def test_a_stack_of_two_is_two_layers(factory, shape, activated):
    norm = factory(50)
    stack = norm(Site(8, 2, len(shape) - 2, activated)).double()
    alone = [randomised(norm(Site(8, 1, len(shape) - 2, activated))) for _ in range(2)]
    with torch.no_grad():
        for single in alone[1].parameters():
            single.mul_(0.7)
        for whole, *parts in zip(stack.parameters(), *(layer.parameters() for layer in alone), strict=True):
            whole.copy_(torch.cat(parts))
    for seed in range(15):
        x, dy = ([noise(*shape, seed=seed + 100 * i) * (i % 2 + 1) for i in pair] for pair in ((0, 1), (2, 3)))
        output, dx = step_of_input(stack, torch.cat(x, 1), torch.cat(dy, 1))
        parts = [step_of_input(layer, *both) for layer, *both in zip(alone, x, dy, strict=True)]
        assert_same([output, dx], [torch.cat([part[i] for part in parts], 1) for i in range(2)])
    stack.eval()
    assert_same([stack(torch.cat(x, 1))], [torch.cat([layer.eval()(one) for layer, one in zip(alone, x)], 1)])


def step_of_input(layer: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    return y.detach(), torch.autograd.grad(y, x, dy)[0]


@each_factory
def test_activations_are_where_the_site_has_one(factory):
    x = noise(4, 8, 6)
    with_one, without = (factory(50)(Site(8, 1, 1, activated)).double()(x).min() for activated in (True, False))
    assert without < -0.5
    assert with_one > -0.5


@each_factory
@each_transform
def test_training_a_stack_is_training_each_model_by_torch(factory, transform):
    # fastai's net has a layer with one position, the residual net layers without activation.
    for network in (networks.fastai_net, networks.residual_net):
        both_are_trained_alike(network, factory(6), transform)


def both_are_trained_alike(network: networks.Network, norm: networks.Norm, transform: Callable[[nn.Module], None]):
    part = tasks.TASKS["plain conv net"].data(False).train
    part = part._replace(inputs=part.inputs.double())
    seeds, rate = (0, 7), torch.tensor([0.003, 0.01])
    batches = torch.stack([tasks.schedule(part.classes, 4, False, 24, seed) for seed in seeds], 1)
    stack = networks.build_stack(network, norm, seeds, 2).double()
    transform(stack)
    rated = train.RatedOptimizer("SGD", stack, rate.double().repeat_interleave(2))
    train.train(stack, rated, part, batches, copies=2)

    single = networks.build_stack(network, norm, seeds[1:], 1).double()
    transform(single)
    plain = torch.optim.SGD(single.parameters(), lr=rate[1].item(), momentum=0.9)
    for number, batch in enumerate(batches[:, 1]):
        plain.param_groups[0]["lr"] = rate[1].item() * (1 - number / 6)
        plain.zero_grad()
        F.cross_entropy(single(part.inputs[batch]).flatten(1), part.labels[batch]).backward()
        plain.step()
    last = {name: parameter.view(4, -1)[3] for name, parameter in stack.named_parameters()}
    # The rates are float32, here and there.
    for name, parameter in single.named_parameters():
        torch.testing.assert_close(parameter.flatten(), last[name], rtol=1e-5, atol=1e-7)


# ------------------------------------------------------------------------------------------------------------- weights


def convolutions() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(4, 6, 3, groups=2, bias=False),
            nn.Conv1d(4, 6, 1, bias=False),
            nn.Conv2d(4, 6, 3),
            nn.Conv2d(4, 4, 1, groups=4, bias=False),
            nn.Linear(4, 6, bias=False),
        ).double()


@each_transform
def test_filters_are_transformed_one_by_one(transform):
    layers = convolutions()
    raw = [layer.weight.detach().clone() for layer in layers]
    transform(layers)
    for layer, old in zip(layers[:2], raw, strict=False):
        assert torch.equal(layer.parametrizations.weight.original, old)
        for ours, before in zip(layer.weight, old, strict=True):
            centred = before - before.sum() / before.numel()
            std = math.sqrt((centred**2).sum().item() / before.numel())
            scale = 1 if transform is rivals.center_weights_of else std + 1e-5
            torch.testing.assert_close(ours, centred / scale)
            assert abs(ours.sum().item()) < 1e-12
    # A bias, a single weight to a filter, no convolution.
    assert not any(parametrize.is_parametrized(layer) for layer in layers[2:])
    for layer, old in zip(layers[2:], raw[2:], strict=True):
        assert torch.equal(layer.weight, old)


def test_standardised_filters_have_a_standard_deviation_of_one():
    layers = convolutions()
    rivals.standardize_weights(layers)
    for layer in layers[:2]:
        std = layer.weight.flatten(1).std(1, correction=0)
        # Within the 1e-5 of standard deviations of 0.1 to 0.3.
        torch.testing.assert_close(std, torch.ones_like(std), rtol=2e-4, atol=0)


@each_transform
def test_gradients_of_raw_weights_are_centred(transform):
    layers = convolutions()
    transform(layers)
    layer = layers[0]
    layer(noise(2, 4, 5, 5)).backward(noise(2, 6, 3, 3, seed=1) + 1)
    gradient = layer.parametrizations.weight.original.grad.flatten(1)
    assert gradient.abs().max() > 1
    assert gradient.sum(1).abs().max() < 1e-10
    if transform is rivals.standardize_weights:
        # The transformed filter does not depend on the scale of the raw one, but for the 1e-5.
        products = (gradient * layer.parametrizations.weight.original.flatten(1)).sum(1)
        assert products.abs().max() < 1e-3 * gradient.norm(dim=1).max()


@each_transform
def test_in_the_networks_all_convolutions_but_the_last_are_transformed(transform):
    for task in tasks.TASKS.values():
        stack = networks.build_stack(task.network, rivals.frn(1), (0, 1), 1)
        names = [name for name, _ in stack.named_parameters()]
        before = [parameter.detach().clone() for parameter in stack.parameters()]
        transform(stack)
        every = [layer for layer in stack.modules() if isinstance(layer, (nn.Conv1d, nn.Conv2d))]
        assert [parametrize.is_parametrized(layer) for layer in every] == [True] * (len(every) - 1) + [False]
        after = {name.replace("parametrizations.weight.original", "weight"): p for name, p in stack.named_parameters()}
        for name, old in zip(names, before, strict=True):
            assert torch.equal(after[name], old)
