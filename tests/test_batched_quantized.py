"""Quantized layers in the batched format: every scheme, with everything that changes what is quantized."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from compile_moe import BatchedPrepareAndFinalize, FusedMoEModularKernel
from compile_moe.ops import batch_tokens
from compile_moe.ops.sort_tokens import sort_tokens_torch
from tests.support.batched import EXPERTS, PoisonedParts, batched_kernel, kept, options_of, poisoning
from tests.support.oracle import CASES, make_layer
from tests.support.quantized import (
    ONE_A_SCALING,
    VARIANTS,
    Quantized,
    Variant,
    assert_as_accurate,
    make_quantized,
)
from tests.support.quantized_calls import CALLABLES, STATIC
from tests.support.quantized_inputs import opcheck

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "no_grad")

FP8 = Variant("fp8_w8a8_tensor")


@pytest.fixture
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def kernel_of(
    q: Quantized, max_num_tokens: int, experts: Any = "triton", parts: type[Any] = BatchedPrepareAndFinalize
) -> FusedMoEModularKernel:
    return batched_kernel(q.layer, max_num_tokens, experts, q.config(), parts)


def check(kernel: Any, q: Quantized, max_num_tokens: int) -> None:
    result = kernel(*q.args, **options_of(q.layer))
    assert_as_accurate(result, replace(q, layer=kept(q.layer, max_num_tokens).layer))


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize(
    "case", ["M0", "M1", "odd", "biased", "skipped-mapped", "all-on-one", "topk1-on-input"]
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_layer(variant: str, case: str, experts: str, poison_empty: None) -> None:
    """Over capacity, with NaN before and behind the experts in rows without tokens."""
    q = make_quantized(VARIANTS[variant], **CASES[case])
    kernel = kernel_of(q, 5, poisoning(EXPERTS[experts]), PoisonedParts)
    check(kernel, q, 5)
    assert kernel.prepare_finalize.num_dropped.tolist() == kept(q.layer, 5).num_dropped


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("case", ["M0", "M1", "skipped-mapped", "biased", "topk1-on-input"])
@pytest.mark.parametrize("static", STATIC)
def test_static_scales(static: str, case: str, experts: str) -> None:
    q = make_quantized(FP8, static=static, **CASES[case])
    check(kernel_of(q, 7, experts, PoisonedParts), q, 7)


#: Every scheme, and those whose GEMMs are one op for each way to scale tokens.
COMPILED = [*((v, "triton") for v in VARIANTS), *((v, "torch") for v in ONE_A_SCALING)]


@pytest.mark.parametrize(("variant", "experts"), COMPILED)
def test_compiled_once_for_all_token_counts(variant: str, experts: str) -> None:
    first = make_quantized(VARIANTS[variant], M=9, biased=True)
    kernel = kernel_of(first, 6, experts, PoisonedParts)
    # Inductor compiles what tokens are quantized by; the GEMMs are ops to it.
    by_inductor = experts == "triton" and variant in ONE_A_SCALING
    counter = CompileCounterWithBackend("inductor" if by_inductor else "aot_eager")
    compiled = torch.compile(kernel, fullgraph=True, dynamic=True, backend=counter)
    for m in (9, 33, 4):
        q = make_quantized(VARIANTS[variant], M=m, biased=True)
        for name in ("w1", "w2", "w1_bias", "w2_bias"):
            setattr(q.layer, name, getattr(first.layer, name))
        q.q1, q.q2 = first.q1, first.q2
        check(compiled, q, 6)
    assert counter.frame_count == 1


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("name", CALLABLES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_callable(variant: str, name: str, experts: str) -> None:
    function = CALLABLES[name]
    q = make_quantized(VARIANTS[variant], M=17, activation=function, function=function, skipped=True, topk=3)
    check(kernel_of(q, 6, experts, PoisonedParts), q, 6)


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_overridden_activation(variant: str, experts: str) -> None:
    """Runs between the GEMMs, and what it makes of rows without tokens reaches no scale."""
    q = make_quantized(VARIANTS[variant], M=17, topk=3)

    class Own(EXPERTS[experts]):  # type: ignore[misc]
        def activation(self, activation: Any, output: Tensor, input: Tensor) -> None:
            gate, up = input.chunk(2, -1)
            output.copy_(torch.where(input.abs().sum(-1, keepdim=True) == 0, 1e5, F.silu(gate) * up))

    check(kernel_of(q, 7, Own, PoisonedParts), q, 7)


@pytest.mark.parametrize(("variant", "experts"), COMPILED)
def test_autocast(variant: str, experts: str) -> None:
    q = make_quantized(VARIANTS[variant], biased=True, M=17)
    kernel = kernel_of(q, 9, experts)
    low = q.layer.to(torch.bfloat16)
    low.w1, low.w2 = q.layer.w1, q.layer.w2
    expected = replace(q, layer=kept(low, 9).layer)
    with torch.autocast("cpu", torch.bfloat16):
        eager = kernel(*q.args)
        compiled = torch.compile(kernel, fullgraph=True, backend="aot_eager")(*q.args)
    assert_as_accurate(eager, expected)
    assert_as_accurate(compiled, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_batch_is_quantized(variant: str) -> None:
    """Before it is copied to the experts, and once: the batch has the bytes of the scheme's tokens."""
    q = make_quantized(VARIANTS[variant], M=9)
    x, _, _, weights, ids = q.args
    batch, scale, _, *_ = BatchedPrepareAndFinalize(18, quant_config=q.config()).prepare(
        x, None, None, weights, ids, 5, None, False
    )
    scaling = q.variant.made.token_scaling
    assert batch.dtype is (x.dtype if scaling is None else scaling.dtype)
    if scaling is None:
        assert scale is None
    elif scaling.per == "tensor":
        assert scale.shape == (1,)
    else:
        assert scale.shape == (5, 18, scaling.scale_shape(9, x.size(1))[1])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    layer = make_layer(M=9, skipped=True)
    opcheck(batch_tokens, (layer.hidden_states.to(dtype), *sort_tokens_torch(layer.topk_ids, 5), 2, 3))
