"""The warm-up loads what compiled graphs of one token call in a quantized layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import compile_moe
from compile_moe import FusedMoEQuantConfig
from compile_moe.ops import quantized_one_token_experts
from compile_moe.ops.named_activations import program_text
from tests.support.fake_cuda import fake_cuda
from tests.support.quantized import Variant
from tests.test_quantized_one_token import INT4, MX, TENSOR, TOKENS, TOPK, ZEROS, K, arguments


class Calls(TorchDispatchMode):
    """Records the arguments of the op's calls by name, but for defaults."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[dict[str, Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is quantized_one_token_experts:
            self.found.append(dict(zip((a.name for a in func._schema.arguments), args, strict=False)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("variant", "settings", "num_calls"),
    [
        (INT4, {}, 2),
        (ZEROS, {"dtype": torch.float16}, 2),
        (MX, {"activation": "swigluoai"}, 2),
        *((variant, {}, 2) for variant in TOKENS),
        (TENSOR, {"static": True}, 0),
        (INT4, {"activation": lambda gate_up: gate_up.chunk(2, -1)[0].cumsum(-1)}, 0),
    ],
    ids=[
        "int4",
        "zero points",
        "mxfp4",
        *(variant.scheme for variant in TOKENS),
        "static scales",
        "callable",
    ],
)
def test_warm_up(variant: Variant, settings: dict[str, Any], num_calls: int) -> None:
    """It loads what compiled graphs of one token call: with weights to round, and without."""
    settings = {"dtype": torch.bfloat16, "static": False} | settings
    dtype, static = settings["dtype"], settings.pop("static")
    with fake_cuda(), FakeTensorMode(), Calls() as calls:
        _, w1, w2, _, _, config, options = arguments(
            variant, dtype=dtype, biased=True, mapped=True, static=static
        )
        quant_config = FusedMoEQuantConfig(variant.scheme, **config)
        compile_moe.warm_up(w1, w2, TOPK, quant_config=quant_config, **options, **settings)
    assert [call.get("round_weights", False) for call in calls.found] == [False, True][:num_calls]
    for call in calls.found:
        x, scheme, epilogue = call["hidden_states"], call["scheme"], call["epilogue"]
        scaling = variant.made.token_scaling
        assert (x.shape, x.dtype) == ((1, K), dtype if scaling is None else scaling.dtype)
        assert (call["hidden_states_scale"] is None) is (scaling is None)
        assert (call["out_dtype"], call["topk_ids"].shape) == (dtype, (1, TOPK))
        assert scheme == variant.made.text and epilogue == program_text(settings.get("activation", "silu"))
        assert all(call[name] is given for name, given in (config | options).items())
