"""Training loops that others wrote, against the same steps written out: Lightning, accelerate, ignite, transformers."""

import contextlib
import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import noise
from models import each_of_ours
from steps import assert_identical, buffers_of, training_step
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from runningbn import batchnormify

ACCUMULATED = 2
X, Y = noise((24, 3, 4, 4), 0) * 2 + 1, noise((24, 2), 1)


def net(to: str) -> nn.Module:
    torch.manual_seed(0)
    body = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 2), nn.BatchNorm2d(2), nn.Flatten()
    return batchnormify(nn.Sequential(*body), to)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def loader() -> DataLoader:
    return DataLoader(TensorDataset(X, Y), batch_size=4)


def descend(model: nn.Module, epochs: int = 1, autocast: bool = False) -> dict[str, Tensor]:
    """The state after SGD with gradients accumulated over two batches of the loader."""
    optimizer = sgd(model)
    for _ in range(epochs):
        for i, (x, y) in enumerate(loader()):
            with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
                loss = F.mse_loss(model(x), y) / ACCUMULATED
            loss.backward()
            if i % ACCUMULATED == ACCUMULATED - 1:
                optimizer.step()
                optimizer.zero_grad()
    return dict(model.state_dict())


# ------------------------------------------------------------------------------------------------------------ Lightning


@each_of_ours
@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_lightning_in_bfloat16_with_accumulation_trains_bit_for_bit_as_a_plain_loop(to, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Lightning's own imports warn of
        pl = pytest.importorskip("lightning.pytorch")

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net(to)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return F.mse_loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return sgd(self.net)

    module = Module()
    off = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, precision="bf16-mixed", accumulate_grad_batches=ACCUMULATED,
        default_root_dir=tmp_path, **dict.fromkeys(off, False),
    )  # fmt: skip
    trainer.fit(module, loader())
    assert_identical(dict(module.net.state_dict()), descend(net(to), autocast=True))


# ----------------------------------------------------------------------------------------------------------- accelerate


@pytest.fixture
def accelerator() -> Iterator[Any]:
    accelerate = pytest.importorskip("accelerate")
    yield accelerate.Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATED)
    # It lives in singletons.
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def accelerated_epoch(accelerator: Any, model: nn.Module, optimizer: Any, batches: Any) -> None:
    for x, y in batches:
        with accelerator.accumulate(model):
            accelerator.backward(F.mse_loss(model(x), y))
            optimizer.step()
            optimizer.zero_grad()


@each_of_ours
def test_accelerate_trains_bit_for_bit_as_a_plain_loop(to, accelerator):
    model = net(to)
    accelerated_epoch(accelerator, *accelerator.prepare(model, sgd(model), loader()))
    assert_identical(dict(model.state_dict()), descend(net(to)))


@each_of_ours
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "torch.save"])
def test_accelerate_resumes_bit_for_bit(to, safe, accelerator, tmp_path: Path):
    model = net(to)
    prepared = accelerator.prepare(model, sgd(model), loader())
    accelerated_epoch(accelerator, *prepared)
    accelerator.save_state(tmp_path, safe_serialization=safe)
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    accelerated_epoch(accelerator, *prepared)
    expected = buffers_of(model) | {name: tensor.clone() for name, tensor in model.state_dict().items()}
    accelerator.load_state(tmp_path)
    assert_identical(dict(model.state_dict()), saved)
    accelerated_epoch(accelerator, *prepared)
    assert_identical(buffers_of(model) | dict(model.state_dict()), expected)


# --------------------------------------------------------------------------------------------------------------- ignite


@each_of_ours
def test_ignite_trains_bit_for_bit_as_a_plain_loop(to):
    engine = pytest.importorskip("ignite.engine")
    model = net(to)
    trainer = engine.create_supervised_trainer(model, sgd(model), F.mse_loss, gradient_accumulation_steps=ACCUMULATED)
    trainer.run(loader(), max_epochs=2)
    assert_identical(dict(model.state_dict()), descend(net(to), epochs=2))


@each_of_ours
def test_the_ema_handler_of_ignite_copies_the_statistics(to):
    engine, handlers = pytest.importorskip("ignite.engine"), pytest.importorskip("ignite.handlers")
    model = net(to)
    trainer = engine.create_supervised_trainer(model, sgd(model), F.mse_loss)
    average = handlers.EMAHandler(model, momentum=0.25)
    average.attach(trainer)
    trainer.run(loader(), max_epochs=1)
    assert_identical(buffers_of(average.ema_model), buffers_of(model))
    assert not torch.equal(average.ema_model[0].weight, model[0].weight)


# --------------------------------------------------------------------------------------------------------- transformers


def mobilevit() -> tuple[nn.Module, Tensor]:
    """BatchNorm2d in all of its blocks."""
    from transformers import MobileViTConfig, MobileViTModel

    config = MobileViTConfig(
        hidden_sizes=[16, 20, 24], neck_hidden_sizes=[8, 8, 12, 16, 20, 24, 32], num_attention_heads=2
    )
    return MobileViTModel(config), noise((2, 3, 64, 64), 0)


def conformer() -> tuple[nn.Module, Tensor]:
    """BatchNorm1d between the convolutions of each block."""
    from transformers import ParakeetEncoder, ParakeetEncoderConfig

    config = ParakeetEncoderConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16, num_mel_bins=16,
        subsampling_conv_channels=4, conv_kernel_size=3, layerdrop=0.0,
    )  # fmt: skip
    return ParakeetEncoder(config), noise((2, 64, 16), 0)


class LastHiddenState(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(1)  # of the dropout
        return self.model(x).last_hidden_state


def checkpointed_and_plain(build: Any, to: str, use_reentrant: bool) -> tuple[nn.Module, nn.Module]:
    pytest.importorskip("transformers", minversion="5")
    torch.manual_seed(0)
    model, _ = build()
    plain = LastHiddenState(batchnormify(model.train(), to))
    checkpointed = copy.deepcopy(plain)
    checkpointed.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    return checkpointed, plain


# Since transformers 5 it is called activation_checkpointing_enable, and the old name works still.
old_name = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
each_model = pytest.mark.parametrize("build", [mobilevit, conformer])
each_checkpointing = pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])


@old_name
@each_of_ours
@each_model
@each_checkpointing
def test_gradient_checkpointing_of_transformers_trains_bit_for_bit_as_without(build, to, use_reentrant):
    checkpointed, plain = checkpointed_and_plain(build, to, use_reentrant)
    for seed in range(2):
        x = build()[1] + seed
        assert_identical(training_step(checkpointed, x), training_step(plain, x))
        assert_identical(buffers_of(checkpointed), buffers_of(plain))


@old_name
@each_model
@each_checkpointing
def test_gradient_checkpointing_of_transformers_makes_batchnorm_count_batches_twice(build, use_reentrant):
    # That the blocks with the layers in them are recomputed: without, the test above would show nothing.
    checkpointed, plain = checkpointed_and_plain(build, "torch", use_reentrant)
    counts = []
    for model in (checkpointed, plain):
        training_step(model, build()[1])
        counts.append({int(b) for name, b in model.named_buffers() if name.endswith("num_batches_tracked")})
    assert 2 in counts[0]
    assert counts[1] == {1}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@each_of_ours
def test_from_pretrained_of_transformers_loads_what_is_converted_afterwards(to, tmp_path):
    pytest.importorskip("transformers", minversion="5")
    torch.manual_seed(0)
    model, x = mobilevit()
    cls = type(model)

    class Converted(cls):
        config_class = cls.config_class

        def __init__(self, config: Any, **kwargs: Any) -> None:
            super().__init__(config, **kwargs)
            batchnormify(self, to)

    batchnormify(model.train(), to)
    training_step(LastHiddenState(model), x)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model.eval()(x).last_hidden_state
        found = batchnormify(cls.from_pretrained(tmp_path), to).eval()(x).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0)
    with pytest.raises(RuntimeError, match="from_pretrained of transformers"):
        Converted.from_pretrained(tmp_path)
    again = Converted(model.config)
    again.load_state_dict(model.state_dict())
    assert_identical(dict(again.state_dict()), dict(model.state_dict()))
