"""From a trained model to one that serves: fused, frozen, traced, exported, on models nobody here wrote.

`plain` is always the model that `batchnormify(model, "torch")` gives, whose evaluation is the same bit for bit; single
layers are the subject of test_export.py.
"""

import copy
import functools

import onnxruntime
import pytest
import torch
import torch._dynamo.testing
import torch._inductor.config
import torch.fx.experimental.optimization
from models import OURS, each_of_ours
from real_models import gradients
from real_models_elsewhere import ELSEWHERE
from real_models_images import IMAGES
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.utils.fusion import fuse_conv_bn_eval

from runningbn import batchnormify

CASES = {case.id: case for case in (*IMAGES, *ELSEWHERE)}
SERVED = ("resnet", "mobilenet_v2")

# A fused or compiled model computes the same in another order. Each of its up to 52 normalised layers has sums of at
# most some hundred float32 products, whose roundings add up as their root: √(100·52)·6e-8, and room for
# layers that enlarge them.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


class Logits(nn.Module):
    """The model as those see it who serve it: a tensor in, a tensor out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values=pixel_values).logits


def images(samples: int, size: int = 32, seed: int = 1) -> Tensor:
    return torch.randn(samples, 3, size, size, generator=torch.Generator().manual_seed(seed))


@functools.cache
def trained(id: str, to: str) -> nn.Module:
    """A converted model after a training step, in evaluation mode."""
    model = batchnormify(CASES[id].model(), to)
    gradients(model, CASES[id].batches()[0])
    return Logits(model).eval()


def served(id: str, to: str) -> tuple[nn.Module, nn.Module]:
    """A converted model, and its form in torch's layers."""
    model = copy.deepcopy(trained(id, to))
    return model, batchnormify(copy.deepcopy(model), "torch")


each_served = pytest.mark.parametrize("id", SERVED)
# Exporters take their time, and see the same operations of either layer.
each_in_turn = pytest.mark.parametrize(("id", "to"), list(zip(SERVED, OURS)))
quiet_exporters = pytest.mark.filterwarnings(
    # torch.onnx and what it is written with warn of their own futures.
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore::UserWarning",
)

# -------------------------------------------------------------------------------------------------------- in eager mode


@each_of_ours
@each_served
@torch.no_grad()
def test_torch_form_evaluates_any_size_as_the_converted_model(id: str, to: str):
    model, plain = served(id, to)
    for samples, size in ((1, 32), (5, 48)):
        x = images(samples, size)
        torch.testing.assert_close(model(x), plain(x), rtol=0.0, atol=0.0)


def fuse_pairs(model: nn.Module) -> int:
    """Fold each normalisation of transformers' convolutional layers into its convolution; how many there were."""
    pairs = [m for m in model.modules() if hasattr(m, "convolution") and hasattr(m, "normalization")]
    for pair in pairs:
        pair.convolution = fuse_conv_bn_eval(pair.convolution, pair.normalization)
        pair.normalization = nn.Identity()
    return len(pairs)


@pytest.mark.parametrize("form", ["converted", "torch"])
@each_of_ours
@each_served
@torch.no_grad()
def test_normalisations_fold_into_convolutions(id: str, to: str, form: str):
    model, plain = served(id, to)
    fused = {"converted": model, "torch": plain}[form]
    x = images(3)
    expected = fused(x)
    assert fuse_pairs(fused) == len([m for m in trained(id, to).modules() if hasattr(m, "running_mean")])
    torch.testing.assert_close(fused(x), expected, **CLOSE)


# ------------------------------------------------------------------------------------------------------------- tracing


@pytest.mark.slow
@pytest.mark.filterwarnings(
    # Tracing asks every property of a model, and transformers has deprecated one.
    "ignore::torch.jit.TracerWarning",
    "ignore::DeprecationWarning",
    "ignore:.is_gradient_checkpointing:FutureWarning",
)
@each_of_ours
@each_served
@torch.no_grad()
def test_traced_model_evaluates_other_batches(id: str, to: str):
    model, plain = served(id, to)
    traced = torch.jit.trace(model, images(2))
    torch.testing.assert_close(traced(images(5)), plain(images(5)), **CLOSE)


def signal_net(to: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """A convolutional net of MONAI without control flow, which FX can trace: converted, its torch form, a batch."""
    case = CASES["monai-unet-1d"]
    model, (batch,) = batchnormify(case.model(), to), case.batches()
    gradients(model, batch)
    model.eval()
    return model, batchnormify(copy.deepcopy(model), "torch"), batch["x"]


@each_of_ours
@torch.no_grad()
def test_fx_traces_and_fuses_the_torch_form(to: str):
    _, plain, x = signal_net(to)
    expected = plain(x)
    torch.testing.assert_close(torch.fx.symbolic_trace(plain)(x), expected, rtol=0.0, atol=0.0)
    fused = torch.fx.experimental.optimization.fuse(plain)
    assert count(fused, nn.BatchNorm1d) < count(plain, nn.BatchNorm1d)
    torch.testing.assert_close(fused(x), expected, **CLOSE)


@each_of_ours
@torch.no_grad()
def test_fx_traces_the_converted_model_around_its_layers(to: str):
    model, _, x = signal_net(to)

    class Tracer(torch.fx.Tracer):
        # FX enters every module that is not torch's own; ours decide by the shape of their input.
        def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
            return isinstance(module, nn.modules.batchnorm._BatchNorm) or super().is_leaf_module(module, qualified_name)

    traced = torch.fx.GraphModule(model, Tracer().trace(model))
    torch.testing.assert_close(traced(x), model(x), rtol=0.0, atol=0.0)


@each_of_ours
def test_fx_refuses_a_training_step_and_what_it_traced_before_is_converted(to: str):
    _, plain, x = signal_net(to)
    expected = gradients(batchnormify(copy.deepcopy(plain), to), {"x": x})
    traced = batchnormify(torch.fx.symbolic_trace(plain.train()), to)
    found = gradients(traced, {"x": x})
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0.0, atol=0.0)
    with pytest.raises(RuntimeError, match="Trace the model first and convert what comes out"):
        torch.fx.symbolic_trace(batchnormify(plain, to))


@each_of_ours
def test_fx_traces_layers_in_training_that_keep_no_statistics(to: str):
    layer = batchnormify(nn.BatchNorm1d(3), to)
    layer.track_running_stats = False
    x = torch.randn(8, 3)
    torch.testing.assert_close(torch.fx.symbolic_trace(layer)(x), layer(x), rtol=0.0, atol=0.0)


def count(model: nn.Module, cls: type[nn.Module]) -> int:
    return sum(isinstance(module, cls) for module in model.modules())


# ------------------------------------------------------------------------------------------------- compiled, exported


@pytest.mark.slow
@torch.no_grad()
def test_compiled_model_evaluates_any_size_in_no_more_graphs_than_its_torch_form():
    graphs = [torch._dynamo.testing.CompileCounter() for _ in range(2)]
    model, plain = served("resnet", "running")
    torch._dynamo.reset()
    compiled, compiled_plain = (
        torch.compile(form, backend=counter, fullgraph=True, dynamic=True)
        for form, counter in zip((model, plain), graphs)
    )
    for samples, size in ((2, 32), (5, 48), (3, 64)):
        x = images(samples, size)
        torch.testing.assert_close(compiled(x), compiled_plain(x), **CLOSE)
    # Two for both: the last feature map of the first size is one pixel, which torch makes a graph of its own for.
    assert graphs[0].frame_count <= graphs[1].frame_count
    torch._dynamo.reset()


@pytest.mark.slow
@torch.no_grad()
def test_inductor_freezes_the_normalisation_into_the_convolutions():
    model, plain = served("resnet", "running")
    torch._dynamo.reset()
    with torch._inductor.config.patch(freezing=True):
        compiled = torch.compile(model, fullgraph=True)
        x = images(3)
        torch.testing.assert_close(compiled(x), plain(x), **CLOSE)
    torch._dynamo.reset()


# MobileNetV2 pads by the remainder of the size, which the exporter makes a constant in the unconverted model, too.
FREE_SIZES = {
    "resnet": {0: Dim("batch"), 2: 32 * Dim("height"), 3: 32 * Dim("width")},
    "mobilenet_v2": {0: Dim("batch")},
}


@pytest.mark.slow
@each_in_turn
@torch.no_grad()
def test_exported_program_evaluates_batches_and_images_of_other_sizes(id: str, to: str):
    model, plain = served(id, to)
    program = torch.export.export(model, (images(2, 64),), dynamic_shapes=(FREE_SIZES[id],))
    assert program.graph_signature.buffers_to_mutate == {}
    for samples, size in ((1, 64), (5, 96 if 2 in FREE_SIZES[id] else 64)):
        x = images(samples, size)
        torch.testing.assert_close(program.module()(x), plain(x), **CLOSE)


@pytest.mark.slow
@quiet_exporters
@each_in_turn
@torch.no_grad()
def test_onnx_runtime_evaluates_other_batches(id: str, to: str, tmp_path):
    model, plain = served(id, to)
    path = tmp_path / "model.onnx"
    batch = ({0: Dim("batch")},)
    torch.onnx.export(model, (images(2),), path, dynamo=True, dynamic_shapes=batch, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (name,) = (x.name for x in session.get_inputs())
    for samples in (1, 5):
        (logits,) = session.run(None, {name: images(samples).numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), plain(images(samples)), **CLOSE)
