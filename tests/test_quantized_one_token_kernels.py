"""The kernels of one token on weights of 4 and 8 bits: where they serve, what they cost, and results on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import compile_moe
from compile_moe.ops import quantize_tokens, quantized_one_token_experts
from compile_moe.ops.epilogue import parse
from compile_moe.ops.kernels.quantized.one_token import launches
from compile_moe.ops.kernels.quantized.one_token.launches import parts_of_slots, serve
from compile_moe.ops.named_activations import program_text
from compile_moe.ops.quantized_format import weight_format
from compile_moe.quantization import SCHEMES
from compile_moe.quantization.rounding import LARGEST
from tests.support.aot import CAPABILITIES
from tests.support.quantized import Variant, assert_as_accurate, make_quantized
from tests.support.quantized_one_token import CASES, VARIANTS, arguments_of, make, run_one_token
from tests.test_kernels_ahead_of_time import SHAPES, compile_launch, empty

BF16 = {"dtype": torch.bfloat16}
#: Stored numbers, without zero points.
ZERO_AND_ONE = {"int4_w4a16": (8, 9), "int8_w8a16": (128, 129), "mxfp4_w4a16": (0, 2)}
WEIGHT_ONLY = [name for name, variant in VARIANTS.items() if variant.made.token_scaling is None]


def served(
    variant: Variant, k: int = 512, dtype: torch.dtype = torch.bfloat16, rows: int = 64, **changed: Tensor
) -> bool:
    scheme = variant.made
    scaling = scheme.token_scaling
    tensors = {
        "x": torch.empty(1, k, dtype=dtype if scaling is None else scaling.dtype),
        "w": torch.empty(*scheme.weight_shape(2, rows, k), dtype=scheme.weight_dtype),
        "w_scale": torch.empty(*scheme.scale_shape(2, rows, k), dtype=scheme.scale_dtype or dtype),
    }
    return serve(weight_format(scheme.text), **(tensors | changed), out_dtype=dtype)


def test_where_they_serve() -> None:
    assert all(map(served, VARIANTS.values()))
    int4, mxfp4, int8 = (VARIANTS[name] for name in ("int4_w4a16", "mxfp4_w4a16", "int8_w8a16"))
    assert served(int4, dtype=torch.float16) and served(int8, dtype=torch.float16)
    assert not served(mxfp4, dtype=torch.float16) and not served(int4, dtype=torch.float32)
    # Groups that 16 bytes would cross, or that are no power of two.
    assert not served(Variant("int4_w4a16", (("group_size", 16),)))
    assert not served(Variant("int4_w4a16", (("group_size", 96),)), 96 * 4)
    # Rows in whole tiles, and in pieces of 16 bytes.
    assert served(int8, 272) and not served(int8, 264)
    assert served(int8, rows=48) and not served(int8, rows=40)
    assert not served(int8, x=torch.empty(1, 1024, **BF16)[:, ::2])
    assert not served(int8, w=torch.empty(2, 512, 64, dtype=torch.uint8).transpose(1, 2))
    assert not served(int8, w=torch.empty(2, 0, 512, dtype=torch.uint8))
    # Decoded to float16, with scales of whole steps.
    assert served(Variant("fp8_w8a8_channel"), dtype=torch.float16)
    assert not served(Variant("fp8_w8a8_channel"), dtype=torch.float32)
    assert not served(Variant("fp8_w8a8_block", (("block_shape", (128, 64)),)))


def test_segments() -> None:
    """Eight, or two for each slot up to sixteen, of at least 192 bytes; an even number."""
    assert [parts_of_slots(topk, 1440) for topk in (1, 2, 3, 4, 6, 8, 9, 16)] == [4, 4, 2, 2, 2, 2, 1, 1]
    assert [parts_of_slots(topk, 7168) for topk in (1, 2, 4, 8, 16)] == [8, 4, 2, 2, 1]
    assert [parts_of_slots(topk, 256) for topk in (1, 2, 4, 8)] == [2, 1, 1, 1]


def of_shape(variant: Variant, sizes: tuple[int, int, int, int], biased: bool, **dtype: Any) -> Any:
    """Arguments of ``launches_for``, without memory."""
    e, topk, k, i = sizes
    scheme, scaling = variant.made, variant.made.token_scaling
    k, i = (-(-size // scheme.column_multiple) * scheme.column_multiple for size in (k, i))

    def weights(n: int, k: int) -> tuple[Tensor, Tensor, Tensor | None]:
        zeros = scheme.zero_point_shape(e, n, k) if variant.zero_points else None
        return (
            empty(*scheme.weight_shape(e, n, k), dtype=scheme.weight_dtype),
            empty(*scheme.scale_shape(e, n, k), dtype=scheme.scale_dtype or dtype["dtype"]),
            None if zeros is None else empty(*zeros, dtype=torch.uint8),
        )

    program = parse(program_text("swigluoai" if biased else "silu"))
    return (
        empty(1, k, **dtype),
        empty(topk, i, **dtype),
        empty(1, k, **dtype) if scaling is None else empty(1, k, dtype=scaling.dtype),
        None if scaling is None else empty(*scaling.scale_shape(1, k), dtype=torch.float32),
        *weights(2 * i, k),
        *weights(k, i),
        empty(1, topk, dtype=torch.float32),
        empty(1, topk, dtype=torch.int64),
        empty(e, dtype=torch.int64) if biased else None,
        weight_format(scheme.text),
        "16 bits" if scaling is None else scaling.per,
        0.0 if scaling is None else LARGEST[scaling.dtype],
        empty(e, 2 * i, **dtype) if biased else None,
        empty(e, k, **dtype) if biased else None,
        program.triton_source(),
        program.layout,
        True,
        not biased,
    )


#: Every format where most registers are needed, and elsewhere what most models have.
COMPILED = [
    (variant, shape, capability)
    for variant in VARIANTS
    for shape in ("qwen3-30b", "gpt-oss-120b")
    for capability in CAPABILITIES
    if (capability == 90 or (variant in SCHEMES and shape == "gpt-oss-120b"))
    and not (capability < 89 and variant.startswith("fp8"))
]


@pytest.mark.parametrize(("variant", "shape", "capability"), COMPILED)
def test_kernels_ahead_of_time(variant: str, shape: str, capability: int) -> None:
    """Within the registers of the programs that a multiprocessor is meant to have; none are spilled."""
    arguments = of_shape(VARIANTS[variant], SHAPES[shape], shape == "gpt-oss-120b", **BF16)
    scheme = VARIANTS[variant].made
    scaling = scheme.token_scaling
    # Tokens of a step: of the first GEMM, and of the second, whose scales of whole rows need others before.
    if scaling is None:
        of_tokens = (8, 8) if scheme.packed == 2 else (4, 4)
    else:
        of_tokens = (2, 1 if scaling.per == "group" else 5)
    for launch, token_loads in zip(launches.launches_for(*arguments), of_tokens, strict=True):
        result = compile_launch(launch, capability, spills=0)
        assert result.registers <= launch.options["maxnreg"]
        # Weights, those of the first step ahead of the loop, and tokens, 16 bytes at a time.
        assert result.ptx.count("ld.global.v4") == 8 + token_loads


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_on_a_gpu(variant: str, case: str) -> None:
    made = make(variant, case)
    assert_as_accurate(run_one_token(made), made)


@pytest.mark.gpu
def test_router_weights_on_a_gpu() -> None:
    """Rounded by the kernel as in front of it, or left out."""
    made = make("int8_w8a16", "biased, interleaved")
    rounded = made.layer.topk_weights.bfloat16().to(made.layer.topk_weights.dtype)
    in_front = run_one_token(made, topk_weights=rounded)
    assert torch.equal(run_one_token(made, round_weights=True), in_front)
    assert not torch.equal(run_one_token(made), in_front)
    ones = torch.ones_like(rounded)
    assert torch.equal(run_one_token(made, apply_weights=False), run_one_token(made, topk_weights=ones))


@pytest.mark.gpu
@pytest.mark.parametrize("variant", [name for name in VARIANTS if not VARIANTS[name].made.powers_of_two])
def test_float16(variant: str) -> None:
    made = make(variant, "eight", dtype=torch.float16)
    assert_as_accurate(run_one_token(made), made)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", WEIGHT_ONLY)
def test_every_number_on_a_gpu(variant: str, dtype: torch.dtype) -> None:
    """A token with a single 1 brings out a column of weights, which a second GEMM by the identity leaves alone."""
    named = VARIANTS[variant]
    scheme, size = named.made, 512
    if scheme.powers_of_two and dtype is torch.float16:
        pytest.skip("bfloat16 only, which has the range of the scales")
    zero, one = ZERO_AND_ONE[named.scheme]
    codes = torch.full((1, size, size), zero, dtype=torch.uint8) + (one - zero) * torch.eye(
        size, dtype=torch.uint8
    )
    identity = codes if scheme.packed == 1 else codes[..., ::2] | codes[..., 1::2] << 4
    weight = torch.randint(0, 256, scheme.weight_shape(1, size, size), dtype=torch.uint8)
    scale = torch.full(
        scheme.scale_shape(1, size, size),
        127 if scheme.powers_of_two else 1,
        dtype=scheme.scale_dtype or dtype,
    )
    zeros, none = None, None
    if named.zero_points:
        shape = scheme.zero_point_shape(1, size, size)
        assert shape is not None
        zeros = torch.randint(0, 256, shape, dtype=torch.uint8)
        none = torch.full(shape, zero if scheme.packed_zero_points == 1 else zero * 17, dtype=torch.uint8)
    exact = scheme.dequantize(weight, scale, zeros, torch.float64)[0]
    router = torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64)
    for column in range(3, size, 73):
        x = torch.zeros(1, size, dtype=dtype)
        x[0, column] = 1
        arguments = (x, None, weight, scale, zeros, identity, scale, none, *router, scheme.text, dtype)
        rows = quantized_one_token_experts(*(a.cuda() if isinstance(a, Tensor) else a for a in arguments))
        assert torch.equal(rows[0].cpu().double(), exact[:, column])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in WEIGHT_ONLY])
def test_every_number_of_quantized_tokens_on_a_gpu(variant: str, dtype: torch.dtype) -> None:
    """As above; the rows between hold the largest number, so that their scales are 1 and change nothing."""
    scheme, size = VARIANTS[variant].made, 512
    one, largest = (1, 127) if scheme.weight_dtype is torch.int8 else (1.0, 448.0)
    codes = torch.arange(256, dtype=torch.uint8).view(scheme.weight_dtype).float()
    codes = codes[codes.isfinite() & (codes.abs() <= largest)]
    numbers = codes[torch.randint(0, len(codes), (1, size, size))]
    numbers[:, ::128] = largest
    scale = torch.ones(scheme.scale_shape(1, size, size))
    router = torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64)
    weights = [w.to(scheme.weight_dtype) for w in (numbers, torch.eye(size)[None])]
    scaling = scheme.token_scaling
    assert scaling is not None
    x_scale = torch.ones(1, size // 128 if scaling.per == "group" else 1)
    for column in range(3, size, 73):
        x = torch.zeros(1, size)
        x[0, column] = one
        arguments = (
            *(x.to(scaling.dtype), x_scale.view(-1) if scaling.per == "tensor" else x_scale),
            *(weights[0], scale, None, weights[1], scale, None, *router, scheme.text, dtype),
        )
        rows = quantized_one_token_experts(*(a.cuda() if isinstance(a, Tensor) else a for a in arguments))
        assert torch.equal(rows[0].cpu().float(), numbers[0, :, column])


@pytest.mark.gpu
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in WEIGHT_ONLY])
def test_rows_of_all_sizes_on_a_gpu(variant: str) -> None:
    """As the CPU computes them: rows between the GEMMs of 2^-20 to 2^8, of which each scale has to see its own."""
    made = make(variant, "eight")
    w1_scale = made.scales["w1_scale"]
    sizes = 2.0 ** torch.linspace(-20, 8, 16).view(-1, *[1] * (w1_scale.dim() - 1))
    result = run_one_token(made, w1_scale=w1_scale * sizes)
    expected = quantized_one_token_experts(*arguments_of(made, "cpu", w1_scale=w1_scale * sizes))
    torch.testing.assert_close(result, expected, rtol=2e-2, atol=1e-2 * expected.abs().max().item())


@pytest.mark.gpu
@pytest.mark.parametrize(
    "variant",
    ["int4_w4a16", "int8_w8a16", "mxfp4_w4a16", "int4, zero points", "fp8_w8a8_block", "int8_w8a8_channel"],
)
def test_compiled_on_a_gpu(variant: str, fresh_dynamo: None) -> None:
    """As accurate as PyTorch, also replayed as a CUDA graph with another token and other experts."""
    sizes: dict[str, Any] = {"M": 1, "E": 16, "topk": 4, "K": 512, "I": 384, "biased": True, **BF16}
    made = make_quantized(VARIANTS[variant], **sizes)
    args, options = made.on_gpu()

    def run(*args: Tensor) -> Tensor:
        return compile_moe.fused_experts(*args, **options)

    with torch.no_grad():
        compiled = torch.compile(run, fullgraph=True)
        assert_as_accurate(compiled(*args).cpu(), made)
        names = [kernel.name for kernel in compile_moe.explain(run, *args).kernels]
        assert names[-1] == "compile_moe.quantized_one_token_experts"
        # Tokens may have to be quantized before.
        assert len(names) == (1 if variant in WEIGHT_ONLY else 2)
        graph = torch.cuda.CUDAGraph()
        compiled(*args)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            out = compiled(*args)
        x, _, _, weights, ids = args
        x.normal_()
        weights.uniform_()
        ids.copy_(torch.randperm(16, device="cuda")[:4])
        graph.replay()
        expected = compile_moe.fused_experts(*args, **options)
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())


@pytest.mark.gpu
def test_what_is_refused() -> None:
    made = make("int8_w8a16", "plain", dtype=torch.float32)
    with pytest.raises(NotImplementedError, match="16-bit tokens"):
        run_one_token(made)


@pytest.mark.gpu
def test_weights_at_any_address() -> None:
    """The stages compute what the kernels can't read, and say so."""
    made = make("int8_w8a16", "plain")
    w1 = made.q1.weight
    shifted = torch.empty(w1.numel() + 1, dtype=torch.uint8, device="cuda")[1:].view(w1.shape).copy_(w1)
    with pytest.warns(RuntimeWarning, match="w1 starts at no multiple of 4 bytes"):
        assert_as_accurate(run_one_token(made, w1=shifted), made)


@pytest.mark.gpu
def test_quantized_tokens_at_any_address() -> None:
    made = make("int8_w8a8_channel", "plain")
    x, _ = quantize_tokens(made.args[0], "int8 per token")
    shifted = torch.empty(x.numel() + 1, dtype=torch.int8, device="cuda")[1:].view(x.shape).copy_(x)
    with pytest.warns(RuntimeWarning, match="hidden_states starts at no multiple of 4 bytes"):
        assert_as_accurate(run_one_token(made, hidden_states=shifted), made)
