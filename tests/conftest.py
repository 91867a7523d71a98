"""What holds for all tests."""

from collections.abc import Iterator

import pytest
import torch

from runningbn.kernels import cpu_operators
from runningbn.ops.compat import number_of_function_modes

# Most tensors here are tiny, and two threads that wait for each other are then several times slower than one.
torch.set_num_threads(1)

# Memory that nobody has written holds NaN, or the largest integer, so that whoever reads it is seen. On CUDA devices
# the same setting refuses operations of models.
torch.use_deterministic_algorithms(not torch.cuda.is_available())

# torch 2.4 warns of what it does itself, in a reentrant checkpoint and in torch.export.load.
WARNINGS_OF_TORCH_2_4 = (
    r"ignore:`torch.cpu.amp.autocast.args...\)` is deprecated:FutureWarning",
    r"ignore:You are using `torch.load` with `weights_only=False`:FutureWarning",
)


def pytest_configure(config: pytest.Config) -> None:
    if torch.__version__ < (2, 5):
        for line in WARNINGS_OF_TORCH_2_4:
            config.addinivalue_line("filterwarnings", line)


@pytest.fixture(autouse=True)
def no_mode_is_left() -> Iterator[None]:
    """What a test leaves on torch's stack of function modes would be seen by all that come later."""
    yield
    assert number_of_function_modes() == 0


@pytest.fixture(params=["operators", "traced"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How a step gets into compiled code: by the operators for the CPU, or traced, as on GPUs."""
    if request.param == "traced":
        monkeypatch.setattr(cpu_operators, "supports", lambda *arguments: False)


@pytest.fixture
def accelerate_forgets() -> Iterator[None]:
    """Undo what accelerate keeps of a training, also that of transformers, for all that come later."""
    yield
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
