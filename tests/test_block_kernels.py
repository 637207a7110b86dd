"""The kernels of a decode block, in the order of their execution, in code generated for a GPU that is not there."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from typing import Any

import expecttest
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import compile_moe
from compile_moe import routers
from tests.support.fake_cuda import GeneratedKernels, cuda_empty, generated_kernels, with_parameters

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

M, K, I, E, TOPK = 16, 2048, 768, 128, 8
MOST_AFTER_ROUTER = 5
Router = Callable[[Tensor], tuple[Tensor, Tensor]]

_CALL = re.compile(
    r"\b(triton_\w+)\.run\("
    r"|\b(?:extern_kernels|torch\.ops\.compile_moe|torch\.ops|aten)\.([\w.]+?)(?:\.default)?\("
    r"|\.(copy_|fill_|zero_|clone)\("
)
#: What a name of inductor's says about a generated kernel, whatever torch's version.
_CONTENTS = {"weight_and_reduce": "weight_and_reduce", "silu": "silu", "rms_norm|rsqrt": "rms_norm"}


def in_order(generated: GeneratedKernels) -> list[str]:
    """Kernels, extern calls and writes to memory as they run, named alike by all versions of torch.

    A copy, a clone, a fill or a cast is a line of its own, or it isn't there.
    """
    body = generated.code[generated.code.index("def call(") :]
    names = []
    for match in _CALL.finditer(body):
        triton, call, write = match.groups()
        if triton:
            contents = [name for pattern, name in _CONTENTS.items() if re.search(pattern, triton)]
            names.append(" + ".join(contents) or "triton")
        else:
            names.append(call or write)
    return names


def after_router(kernels: list[str]) -> list[str]:
    """The router's GEMM is the first of all."""
    first = next(i for i, name in enumerate(kernels) if name in ("mm", "addmm"))
    return kernels[first + 1 :]


def by_kernels(kernels: dict[str, list[str]]) -> str:
    """The cases that run the same kernels, and the kernels."""
    cases: dict[str, list[str]] = {}
    for case, names in kernels.items():
        cases.setdefault(", ".join(names), []).append(case)
    paragraphs = [line for names, alike in cases.items() for line in (f"{', '.join(alike)}:", f"    {names}")]
    return "\n".join(
        textwrap.fill(p, 110, subsequent_indent="    ", break_on_hyphens=False) for p in paragraphs
    )


def block(
    x: Tensor, norm: Tensor, gate: Tensor, w1: Tensor, w2: Tensor, route: Router, **options: Any
) -> tuple[Tensor, Tensor]:
    """RMSNorm, router, experts, residual, the next layer's RMSNorm."""
    h = F.rms_norm(x, (K,), norm, 1e-6).to(w1.dtype)
    weights, ids = route(F.linear(h, gate))
    x = x + compile_moe.fused_experts(h, w1, w2, weights, ids, **options)
    return x, F.rms_norm(x, (K,), norm, 1e-6).to(w1.dtype)


def arguments(dtype: torch.dtype = torch.bfloat16, m: int = M) -> list[Tensor]:
    """hidden_states and norm in ``dtype``, weights in bfloat16."""
    activations = cuda_empty(m, K, dtype=dtype), cuda_empty(K, dtype=dtype)
    return [*activations, cuda_empty(E, K), cuda_empty(E, 2 * I, K), cuda_empty(E, K, I)]


def kernels_of(function: Callable[..., Any], make: Any = arguments, dynamic: bool = True) -> list[str]:
    return in_order(generated_kernels(function, make, [(0, 0)] if dynamic else []))


ROUTERS: dict[str, Router] = {
    "softmax_topk": lambda x: routers.softmax_topk(x, TOPK, renormalize=True),
    "topk_softmax": lambda x: routers.topk_softmax(x, TOPK),
    "sigmoid_grouped_topk": lambda x: routers.sigmoid_grouped_topk(
        x, TOPK, num_expert_group=8, topk_group=4, routed_scaling_factor=2.5
    ),
}


def written_out(logits: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = logits.softmax(-1, dtype=torch.float32).topk(TOPK)
    return weights / weights.sum(-1, keepdim=True), ids


def clamped_silu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate.clamp(max=7)) * up


class TestBlocks(expecttest.TestCase):
    def test_routers(self) -> None:
        kernels = {
            f"{name} {'dynamic' if dynamic else 'static'}": kernels_of(
                lambda *a, route=route: block(*a, route), dynamic=dynamic
            )
            for name, route in {**ROUTERS, "written out": written_out}.items()
            for dynamic in (False, True)
        }
        assert max(len(after_router(names)) for names in kernels.values()) <= MOST_AFTER_ROUTER
        self.assertExpectedInline(
            by_kernels(kernels),
            """\
softmax_topk static, softmax_topk dynamic, topk_softmax static, topk_softmax dynamic, sigmoid_grouped_topk
    static, sigmoid_grouped_topk dynamic, written out static, written out dynamic:
    rms_norm, mm, route_and_sort_tokens, gather_gemm, scatter_gemm, weight_and_reduce + rms_norm""",
        )

    def test_options(self) -> None:
        """The layer's arguments cost no kernel; a map, which the router doesn't know of, a sort of its own."""

        def with_shared_expert(x: Tensor, norm: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
            *experts, w13, w2 = weights
            shared = clamped_silu(F.rms_norm(x, (K,), norm, 1e-6) @ w13) @ w2
            y, _ = block(x, norm, *experts, written_out, activation=clamped_silu)
            return y + shared, F.rms_norm(y + shared, (K,), norm, 1e-6)

        def with_map(*tensors: Tensor) -> tuple[Tensor, Tensor]:
            return block(*tensors[:5], written_out, expert_map=tensors[5])

        def with_biases(*tensors: Tensor) -> tuple[Tensor, Tensor]:
            return block(*tensors[:5], written_out, w1_bias=tensors[5], w2_bias=tensors[6])

        kernels = {
            "a callable, a shared expert": kernels_of(
                with_shared_expert, lambda: [*arguments(), cuda_empty(K, 2 * I), cuda_empty(I, K)]
            ),
            "one token": kernels_of(lambda *a: block(*a, written_out), lambda: arguments(m=1), dynamic=False),
            "residual in float32": kernels_of(
                lambda *a: block(*a, written_out), lambda: arguments(torch.float32)
            ),
            "biases": kernels_of(with_biases, lambda: [*arguments(), cuda_empty(E, 2 * I), cuda_empty(E, K)]),
            "expert_map": kernels_of(with_map, lambda: [*arguments(), cuda_empty(E, dtype=torch.int32)]),
        }
        self.assertExpectedInline(
            by_kernels(kernels),
            """\
a callable, a shared expert:
    rms_norm, mm, mm, route_and_sort_tokens, gather_gemm, scatter_gemm, silu, mm, weight_and_reduce + rms_norm
one token:
    rms_norm, mm, route_tokens, one_token_experts, rms_norm
residual in float32, biases:
    rms_norm, mm, route_and_sort_tokens, gather_gemm, scatter_gemm, weight_and_reduce + rms_norm
expert_map:
    rms_norm, mm, route_tokens, sort_tokens, gather_gemm, scatter_gemm, weight_and_reduce + rms_norm""",
        )

    def test_transformers(self) -> None:
        """The blocks as transformers has them."""
        names = ("qwen3-30b-a3b", "gpt-oss-20b", "mixtral-8x7b", "qwen3-30b-a3b-shared", "deepseek-v3")
        kernels = {name: transformers_block(name) for name in names}
        self.assertExpectedInline(
            by_kernels(kernels),
            """\
qwen3-30b-a3b, mixtral-8x7b:
    rms_norm, mm, route_and_sort_tokens, gather_gemm, scatter_gemm, weight_and_reduce + rms_norm
gpt-oss-20b:
    rms_norm, addmm, route_and_sort_tokens, gather_gemm, scatter_gemm, weight_and_reduce + rms_norm
qwen3-30b-a3b-shared:
    rms_norm, mm, route_and_sort_tokens, gather_gemm, scatter_gemm, mm, mm, mm, silu, mm, weight_and_reduce +
    rms_norm
deepseek-v3:
    rms_norm, triton, mm, route_and_sort_tokens, gather_gemm, scatter_gemm, mm, mm, silu, mm,
    weight_and_reduce + rms_norm""",
        )

    def test_transformers_with_grouped_mm(self) -> None:
        """What transformers' own experts take."""
        kernels = {name: transformers_block(name, "grouped_mm") for name in ("qwen3-30b-a3b", "mixtral-8x7b")}
        self.assertExpectedInline(
            by_kernels(kernels),
            """\
qwen3-30b-a3b:
    rms_norm, mm, triton, aten.topk, triton, aten.histc, triton, rms_norm, _grouped_mm, silu, _grouped_mm,
    triton, triton, rms_norm
mixtral-8x7b:
    rms_norm, mm, triton, aten.topk, triton, aten.histc, triton, rms_norm, _grouped_mm, silu, _grouped_mm,
    rms_norm""",
        )


def transformers_block(name: str, experts: str = "compile_moe") -> list[str]:
    pytest.importorskip("transformers")
    from compile_moe.cli import moe_layer

    made: list[nn.Module] = []

    def make() -> list[Tensor]:
        config = moe_layer.configuration(name)
        layer = moe_layer.make_layer(config, experts, torch.device("cuda"), torch.bfloat16)
        # DeepSeek's router is in float32 from transformers 5.24.
        made.append(with_parameters(layer, torch.bfloat16))
        return [cuda_empty(M, config.hidden_size)]

    # Folding computes constants on the device.
    return in_order(generated_kernels(lambda x: made[0](x), make, joint_graph_constant_folding=False))


def test_in_place() -> None:
    """Written by the kernel that computes it: no copy; and what follows is in that kernel."""

    def function(x: Tensor, norm: Tensor, gate: Tensor, *experts: Tensor) -> Tensor:
        y = compile_moe.fused_experts(x, *experts, *written_out(x @ gate.t()), inplace=True)
        return F.rms_norm(y, (K,), norm, 1e-6)

    kernels = after_router(kernels_of(function))
    assert kernels == [
        "route_and_sort_tokens",
        "gather_gemm",
        "scatter_gemm",
        "weight_and_reduce + rms_norm",
    ]


def test_autocast() -> None:
    """Autocast's casts cost a router nothing."""

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cuda", torch.bfloat16):
            return block(*tensors, written_out)

    kernels = kernels_of(function, lambda: arguments(torch.float32))
    assert after_router(kernels)[0] == "route_and_sort_tokens", kernels
    assert len(after_router(kernels)) == 4 and kernels[-1] == "weight_and_reduce + rms_norm", kernels


def test_what_writes_memory_shows() -> None:
    """The lists would name what they claim isn't there."""

    def function(x: Tensor) -> tuple[Tensor, ...]:
        product = x @ x
        return product.float(), torch.zeros_like(x), *product.topk(2)

    generated = generated_kernels(
        function, lambda: [cuda_empty(64, 64, dtype=torch.float16)], joint_graph_constant_folding=False
    )
    kernels = in_order(generated)
    assert sorted(kernels) == ["aten.topk", "mm", "triton", "triton"], kernels
    assert in_order(generated._replace(code="def call(args):\n    buf1.copy_(buf0, False)")) == ["copy_"]
