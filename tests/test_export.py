"""Evaluation leaves Python: torch.export and ONNX, with any batch size."""

import io

import onnxruntime
import pytest
import torch
from cases import LAYERS, LayerCase, each, noise
from models import each_of_ours, pretrained
from steps import assert_identical, evaluate, train, trained
from torch import nn
from torch.export import Dim
from versions import needs_onnx_dynamic_shapes, needs_sign_of_exports

from runningbn import PreciseBatchNorm2d, RunningBatchNorm, batchnormify


def exported(model: nn.Module, x: torch.Tensor) -> torch.export.ExportedProgram:
    return torch.export.export(model.eval(), (x,), dynamic_shapes=({0: Dim("batch")},))


@each(LAYERS)
def test_exported_layer_evaluates_batches_of_any_size_as_the_layer(case: LayerCase):
    layer = trained(case)
    program = exported(layer, case.input(4)).module()
    for size in (1, 2, 7):
        x = case.input(size, seed=20)
        torch.testing.assert_close(program(x), evaluate(layer, x), rtol=1e-5, atol=1e-5)


@each(LAYERS)
def test_exported_layer_writes_no_buffer(case: LayerCase):
    signature = exported(trained(case), case.input(4)).graph_signature
    assert signature.buffers_to_mutate == {}


@pytest.mark.parametrize("cls", [RunningBatchNorm, PreciseBatchNorm2d], ids=lambda cls: cls.__name__)
def test_exported_layer_survives_a_file(cls):
    layer = train(cls(3), [noise((4, 3, 2, 2), 0)])
    file = io.BytesIO()
    torch.export.save(exported(layer, noise((4, 3, 2, 2), 0)), file)
    file.seek(0)
    x = noise((5, 3, 2, 2), 1)
    torch.testing.assert_close(torch.export.load(file).module()(x), evaluate(layer, x), rtol=1e-5, atol=1e-5)


@needs_sign_of_exports
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("cls", [RunningBatchNorm, PreciseBatchNorm2d], ids=lambda cls: cls.__name__)
def test_a_training_step_is_not_exported(cls, strict):
    layer, x = cls(3), noise((4, 3, 2, 2), 0)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with pytest.raises(Exception, match=r"cannot be recorded by torch\.export"):
        torch.export.export(layer, (x,), strict=strict)
    assert_identical(layer.state_dict(), before)
    train(layer, [x])  # a step outside of it


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("cls", [RunningBatchNorm, PreciseBatchNorm2d], ids=lambda cls: cls.__name__)
def test_a_training_step_is_not_traced_by_jit(cls):
    layer, x = train(cls(3), [noise((4, 3, 2, 2), 0)]), noise((4, 3, 2, 2), 1)
    with pytest.raises(RuntimeError, match=r"cannot be recorded by .*torch\.jit\.trace"):
        torch.jit.trace(layer, (x,), check_trace=False)
    layer.eval()
    torch.testing.assert_close(torch.jit.trace(layer, (x,))(x), layer(x))


# torch.onnx and what it is written with warn of their own futures.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@needs_onnx_dynamic_shapes
@each_of_ours
def test_onnx_runtime_agrees_on_batches_of_any_size(to, tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.BatchNorm1d(16))
    model = train(batchnormify(pretrained(net), to), [noise((5, 3, 4, 4), 0)]).eval()
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        model, (noise((4, 3, 4, 4), 0),), path, dynamo=True, dynamic_shapes=({0: Dim("batch")},), verbose=False
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (input_of,) = session.get_inputs()
    for size in (1, 2, 7):
        x = noise((size, 3, 4, 4), seed=20)
        (y,) = session.run(None, {input_of.name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), evaluate(model, x), rtol=1e-5, atol=1e-5)
