"""A simulated GPU: Triton compiles for it, and launches do nothing. What remains of a step is the host's part.

Tensors are on the CPU, and their contents are undefined.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

from runningbn import kernels
from runningbn.kernels import triton, triton_devices, triton_launch

H100 = triton_devices.Device(132)


class Launch(NamedTuple):
    """What a launcher of Triton was given.

    Attributes:
        kernel: its name.
        programs: the first dimension of the grid.
        arguments: all of them, compile-time ones included.
        shared: bytes of shared memory for a program.
    """

    kernel: str
    programs: int
    arguments: tuple[Any, ...]
    shared: int


class NoDevice:
    """What Triton asks a driver for, of a Hopper GPU."""

    def __init__(self, launches: list[Launch] | None) -> None:
        self.launches = launches
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 227 << 10},
            # Module, function, registers, spills, threads at most.
            load_binary=lambda *_: (1, 1, 32, 0, 1024),
            unload_module=lambda module: None,
        )

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default one."""
        return 0

    def get_current_target(self) -> Any:
        """sm_90."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """A launcher that launches nothing."""
        if self.launches is None:
            return lambda *_: None

        def note(programs: int, _y: int, _z: int, _stream: int, _function: int, _packed: Any, *rest: Any) -> None:
            # Behind metadata and the two hooks of profilers.
            launches.append(Launch(metadata.name, programs, rest[3:], metadata.shared))

        launches = self.launches
        return note


@contextmanager
def no_device(launches: list[Launch] | None = None, device: triton_devices.Device = H100) -> Iterator[None]:
    """Within, the Triton kernels serve tensors on the CPU; launches are noted in `launches`, and do nothing.

    Raises:
        RuntimeError: if this process has Triton's interpreter, which compiles nothing.
    """
    from triton.runtime import driver

    from runningbn.kernels import triton_kernels

    if triton_devices.INTERPRETED:
        raise RuntimeError("expected a process without TRITON_INTERPRET: the interpreter compiles nothing")
    # Its name has changed, and reset_active looks for a real device.
    name = "_active" if hasattr(driver, "_active") else "active"
    before = getattr(driver, name)
    driver.set_active(NoDevice(launches))
    try:
        # Steps of tensors on the CPU that C prepares would come first.
        no_preparation = mock.patch.object(kernels, "is_ordinary", bool)  # bool() is False, and costs less than a mock
        with mock.patch.object(triton, "device_of", return_value=device), no_preparation:
            _forget(triton_kernels)
            yield
    finally:
        # Compiled kernels ask the driver once more when they go.
        _forget(triton_kernels)
        gc.collect()
        setattr(driver, name, before)


def _forget(triton_module: Any) -> None:
    """What was decided and compiled for another device."""
    triton._can_use.cache_clear()
    triton._plan_of.cache_clear()
    triton_launch.counters.clear()
    for name in ("batch_statistics", "affine_map", "gradient_statistics", "input_gradient"):
        caches = getattr(getattr(triton_module, name), "device_caches", None)
        if caches is not None:
            caches.clear()
