"""Which devices have float8_e4m3fn in Triton."""

from __future__ import annotations

import torch

_LEAST = (8, 9)


def no_float8(dtype: torch.dtype, device: torch.device) -> str:
    """Why kernels on a device can't compute with ``dtype``, and what to do; "" if they can."""
    if dtype is not torch.float8_e4m3fn or device.type != "cuda":
        return ""
    capability = torch.cuda.get_device_capability(device)
    if capability >= _LEAST:
        return ""
    needed, given = (".".join(map(str, c)) for c in (_LEAST, capability))
    return (
        f"{dtype} needs a GPU of compute capability {needed} or higher (Ada, Hopper, Blackwell), got "
        f"{torch.cuda.get_device_name(device)} of {given}; dequantize the weights once with "
        "compile_moe.dequantize_weights, and pass them without quant_config or scales, or use a scheme without float8"
    )
