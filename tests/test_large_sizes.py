"""64-bit addressing: every operand past 2^31 elements in turn, on a GPU; the same checks on few elements on a CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compile_moe.ops import act_and_mul, gather_gemm, scatter_gemm, sort_tokens, weight_and_reduce
from compile_moe.ops.named_activations import program_text

#: Relative error of a product over bfloat16 operands, rounded once.
MOST_ERROR = 4e-3


def sizes(device: str, *numbers: tuple[int, int]) -> list[int]:
    """Of each pair, what a GPU takes, or what a CPU takes."""
    return [large if device == "cuda" else small for large, small in numbers]


def randn(device: str, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, device=device, dtype=torch.bfloat16).mul_(scale)


def assert_large(tensor: Tensor, device: str) -> None:
    assert device == "cpu" or tensor.numel() > 2**31, tensor.shape


def assert_close(result: Tensor, exact: Tensor) -> None:
    assert (result.double() - exact).norm() <= MOST_ERROR * exact.norm()


def ends(num_rows: int) -> tuple[slice, slice]:
    return slice(0, 300), slice(max(0, num_rows - 300), None)


def gate_up(x: Tensor, w1: Tensor, slot: Tensor, expert: Tensor, topk: int) -> Tensor:
    """In float64, row by row: a few rows of x and one expert's w1 at a time."""
    out = torch.empty(len(slot), w1.size(1), dtype=torch.float64, device=x.device)
    for e in expert.unique():
        here = expert == e
        out[here] = x[slot[here] // topk].double() @ w1[e].double().t()
    return out


def silu_and_mul(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def test_intermediate(device: str) -> None:
    """S * I: what GEMM 1 writes and GEMM 2 reads."""
    m, i = sizes(device, (65536, 300), (4224, 40))
    topk, k, e = 8, 32, 4
    x, w1 = randn(device, m, k), randn(device, e, 2 * i, k, scale=k**-0.5)
    w2 = randn(device, e, k, i, scale=i**-0.5)
    ids = torch.randint(0, e, (m, topk), device=device)
    slots, offsets = sort_tokens(ids, e)
    intermediate = gather_gemm(x, w1, slots, offsets, topk, None, program_text("silu"))
    assert_large(intermediate, device)
    out = scatter_gemm(intermediate, w2, slots, offsets, m, topk).view(-1, k)
    for rows in ends(m * topk):
        slot = slots[rows].long()
        expert = ids.flatten()[slot]
        assert_close(intermediate[rows], silu_and_mul(gate_up(x, w1, slot, expert, topk)))
        exact = torch.einsum("si,ski->sk", intermediate[rows].double(), w2[expert].double())
        assert_close(out[slot], exact)


def test_slots_times_hidden_size(device: str) -> None:
    """S * K: what GEMM 2 writes and finalize reads."""
    m, k = sizes(device, (65536, 300), (4224, 40))
    topk, i, e = 8, 32, 4
    rows, w2 = randn(device, m * topk, i), randn(device, e, k, i, scale=i**-0.5)
    ids = torch.randint(0, e, (m, topk), device=device)
    slots, offsets = sort_tokens(ids, e)
    out = scatter_gemm(rows, w2, slots, offsets, m, topk)
    assert_large(out, device)
    weights = torch.rand(m, topk, device=device)
    reduced = weight_and_reduce(out, weights, ids, None, e)
    for part in ends(m * topk):
        slot = slots[part].long()
        exact = torch.einsum("si,ski->sk", rows[part].double(), w2[ids.flatten()[slot]].double())
        assert_close(out.view(-1, k)[slot], exact)
    for part in ends(m):
        assert_close(reduced[part], (out[part].double() * weights[part].double().unsqueeze(-1)).sum(1))


def test_weights(device: str) -> None:
    """E * N * K and E * K * I: the last expert's weights."""
    n, k, i = sizes(device, (8192, 80), (4352, 40), (4096, 40))
    e, m, topk = 128, 16, 2
    x = randn(device, m, k)
    ids = torch.tensor([[0, e - 1]], device=device).expand(m, topk).contiguous()
    slots, offsets = sort_tokens(ids, e)
    expert = ids.flatten()[slots.long()]
    w1 = randn(device, e, n, k, scale=k**-0.5)
    assert_large(w1, device)
    intermediate = gather_gemm(x, w1, slots, offsets, topk, None, program_text("silu"))
    assert_close(intermediate, silu_and_mul(gate_up(x, w1, slots.long(), expert, topk)))
    del w1
    w2 = randn(device, e, k, i, scale=i**-0.5)
    assert_large(w2, device)
    rows = intermediate[:, :i].contiguous()
    out = scatter_gemm(rows, w2, slots, offsets, m, topk).view(-1, k)
    for e_ in (0, e - 1):
        here = expert == e_
        assert_close(out[slots.long()[here]], rows[here].double() @ w2[e_].double().t())


def test_hidden_states(device: str) -> None:
    """M * K: the last token's row."""
    m, k = sizes(device, (65664, 300), (32768, 40))
    n, e = 32, 2
    x, w1 = randn(device, m, k), randn(device, e, n, k, scale=k**-0.5)
    assert_large(x, device)
    ids = torch.randint(0, e, (m, 1), device=device)
    slots, offsets = sort_tokens(ids, e)
    out = gather_gemm(x, w1, slots, offsets, 1, None, program_text("silu"))
    for rows in ends(m):
        slot = slots[rows].long()
        assert_close(out[rows], silu_and_mul(gate_up(x, w1, slot, ids.flatten()[slot], 1)))


def test_activation(device: str) -> None:
    """Rows * N of an activation by itself."""
    rows, n = sizes(device, (262_400, 300), (8192, 80))
    x = randn(device, rows, n)
    assert_large(x, device)
    out = act_and_mul(x, program_text("silu"))
    for part in ends(rows):
        assert_close(out[part], silu_and_mul(x[part].double()))


@pytest.mark.gpu
@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_finalize() -> None:
    """S * K in the kernel that inductor makes of the reduction and a residual."""
    m, topk, k = 65536, 8, 4224
    out = randn("cuda", m, topk, k)
    assert_large(out, "cuda")
    weights, residual = torch.rand(m, topk, device="cuda"), randn("cuda", m, k)
    compiled = torch.compile(lambda *args: weight_and_reduce(*args[:2]) + args[2], fullgraph=True)
    y = compiled(out, weights, residual)
    for part in ends(m):
        exact = (out[part].double() * weights[part].double().unsqueeze(-1)).sum(1) + residual[part].double()
        # Rounded before and after the sum.
        assert (y[part].double() - exact).norm() <= 2 * MOST_ERROR * exact.norm()
