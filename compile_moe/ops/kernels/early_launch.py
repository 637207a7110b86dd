"""Programmatic dependent launch: a kernel is on the multiprocessors before the one ahead of it in the stream has ended.

What a kernel does before :func:`await_earlier_kernels` runs beside whatever was launched before it, which need not be a
kernel of this library, so ours do nothing before (but each ``down_kernel`` of one token, which its launcher puts behind
a kernel that has waited). Every program must call it, also one with nothing to do, because the end of a kernel promises
the end of those ahead of it.

Source: the CUDA programming guide, "Programmatic Dependent Launch and Synchronization".
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@functools.cache
def can_launch_early(device_index: int | None) -> bool:
    """Whether a CUDA device has it (sm_90 and later); not where kernels are interpreted (None)."""
    if device_index is None:
        return False
    properties: Any = torch.cuda.get_device_properties(device_index)
    early: bool = properties.major >= 9
    return early


def early_launch(device: torch.device) -> dict[str, Any]:
    """Options of a launch whose kernel has the constant EARLY."""
    return {"EARLY": True, "launch_pdl": True} if can_launch_early(device.index) else {"EARLY": False}


@triton.jit
def await_earlier_kernels(EARLY: tl.constexpr, STARTS_NEXT: tl.constexpr = True):
    """Behind this, memory is as the kernels ahead left it; the kernel behind this one may start, and wait in turn.

    Args:
        STARTS_NEXT: False: the kernel behind may not start before this one's programs have ended.
    """
    if EARLY:
        gdc_wait()
        if STARTS_NEXT:
            gdc_launch_dependents()
