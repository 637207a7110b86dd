"""Launches past Triton's own ways: the same arguments arrive, and whoever watches Triton's launches sees them."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton import knobs
from triton.backends.nvidia.driver import CudaLauncher
from triton.compiler import CompiledKernel

from compile_moe.ops.kernels.direct_launch import DescribedPlace, Place, launch_all, prepare
from compile_moe.ops.kernels.warp_specialized.descriptors import plain_weights
from tests.support.simulated_gpu import SimulatedGPU, simulated_gpu

GRID, STREAM = (3, 2, 1), 77
#: Constants that equal each other, and an address among them.
ARGS = [Place(0, 0), 1, 1.0, True, Place(1, 256), "silu", None, Place(1, 0), Place(0, 0)]
ADDRESSES = [4096, 8192]
GIVEN = (4096, 1, 1.0, True, 8448, "silu", None, 8192, 4096)


class Kernel:
    """A compiled kernel whose launcher is Triton's, all but the function in C."""

    def __init__(self, **attributes: Any) -> None:
        self.calls: list[tuple[Any, ...]] = []
        launcher = object.__new__(CudaLauncher)
        vars(launcher).update(
            launch=lambda *arguments: self.calls.append(arguments),
            num_ctas=1,
            global_scratch_size=0,
            global_scratch_align=1,
            profile_scratch_size=0,
            profile_scratch_align=1,
            launch_cooperative_grid=False,
            launch_pdl=True,
            gsan_enabled=False,
            arg_annotations=[],
            kernel_signature=b"",
        )
        vars(launcher).update(attributes)
        self.compiled = CompiledKernel.__new__(CompiledKernel)
        vars(self.compiled).update(
            name="kernel",
            src=SimpleNamespace(),
            module=object(),
            function=1234,
            packed_metadata=(4, 1, 0),
            _run=launcher,
        )

    def close(self) -> None:
        """Nothing to unload."""
        self.compiled.module = None


@pytest.fixture
def gpu() -> Iterator[SimulatedGPU]:
    """A driver that Triton's launcher may ask."""
    with simulated_gpu() as simulated:
        yield simulated


@pytest.fixture
def kernel(gpu: SimulatedGPU) -> Iterator[Kernel]:
    made = Kernel()
    yield made
    made.close()


def test_triton_would_end_in_the_same(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    for hook in ("launch_enter_hook", "launch_exit_hook"):
        monkeypatch.setattr(knobs.runtime, hook, None)
    launches = prepare([(kernel.compiled, GRID, ARGS)])
    assert not kernel.calls, "preparing launches nothing"
    assert launches.launches[0].run is kernel.compiled.run.launch
    launch_all(launches, STREAM, ADDRESSES)
    kernel.compiled[GRID](*GIVEN, stream=STREAM)
    direct, of_triton = kernel.calls
    assert direct == of_triton
    assert list(map(type, flat(direct))) == list(map(type, flat(of_triton)))


def flat(values: tuple[Any, ...]) -> list[Any]:
    return [item for value in values for item in (value if isinstance(value, tuple) else [value])]


@pytest.mark.parametrize("which", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_see_launches(kernel: Kernel, which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = prepare([(kernel.compiled, GRID, ARGS)])

    def hook(metadata: Any) -> None:
        pass

    hooks = getattr(knobs.runtime, which)
    launch_all(launches, STREAM, ADDRESSES)
    assert None in kernel.calls[-1] and hooks not in kernel.calls[-1]
    hooks.add(hook)
    try:
        launch_all(launches, STREAM, ADDRESSES)
        assert hooks in kernel.calls[-1]
    finally:
        hooks.remove(hook)
    # One that replaces the chain, as one may.
    monkeypatch.setattr(knobs.runtime, which, hook)
    launch_all(launches, STREAM, ADDRESSES)
    assert hook in kernel.calls[-1]


@pytest.mark.parametrize(
    "attributes", [{"global_scratch_size": 8}, {"profile_scratch_size": 8}, {"gsan_enabled": True}], ids=str
)
def test_launchers_that_do_more_do_it_every_time(gpu: SimulatedGPU, attributes: dict[str, Any]) -> None:
    kernel = Kernel(**attributes)
    (launch,) = prepare([(kernel.compiled, GRID, ARGS)]).launches
    assert launch.run is kernel.compiled.run and launch.inner is None
    kernel.close()


def test_launches_run_in_order_with_their_own_arguments(kernel: Kernel) -> None:
    launches = prepare(
        [(kernel.compiled, GRID, [Place(0, 0), "a", 1]), (kernel.compiled, (1, 1, 1), [Place(1, 8), "b", 1])]
    )
    for addresses in ([16, 32], [64, 128]):
        kernel.calls.clear()
        launch_all(launches, STREAM, addresses)
        first, second = map(flat, kernel.calls)
        assert first[-3:] == [addresses[0], "a", 1] and first[:4] == [*GRID, STREAM]
        assert second[-3:] == [addresses[1] + 8, "b", 1] and second[:4] == [1, 1, 1, STREAM]


def test_descriptors_are_over_the_memory_of_the_call(kernel: Kernel) -> None:
    weights = torch.empty(4, 64, 128, dtype=torch.bfloat16)
    descriptor = plain_weights(weights)
    launches = prepare([(kernel.compiled, GRID, [Place(0, 8), 1, DescribedPlace(Place(1, 256), descriptor)])])
    launch_all(launches, STREAM, ADDRESSES)
    launch_all(launches, STREAM, [16, 32])
    first, second = (flat(call)[-3:] for call in kernel.calls)
    assert first[:2] == [4104, 1] and second[:2] == [24, 1]
    for given, address in ((first[2], 8448), (second[2], 288)):
        assert type(given) is type(descriptor) and given.base.data_ptr() == address
        assert {**vars(given), "base": weights} == vars(descriptor)
