"""Every kernel variant of real model shapes compiles for every architecture, in its registers and shared memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compile_moe.ops.epilogue import parse
from compile_moe.ops.kernels import (
    act_and_mul,
    batch_tokens,
    gather_gemm,
    reduce_batch,
    route_and_sort_tokens,
    route_tokens,
    scatter_gemm,
    sort_batch,
    sort_tokens,
    weight_and_reduce,
)
from compile_moe.ops.kernels.heuristic_tiles import tile_candidates
from compile_moe.ops.kernels.launch import Launch
from compile_moe.ops.kernels.tiles import (
    WARP_SPECIALIZED,
    WARP_SPECIALIZED_64,
    WARP_SPECIALIZED_128,
    WIDE_64,
    WIDE_128,
    DeviceLimits,
    Tile,
    is_vectorized,
)
from compile_moe.ops.kernels.warp_specialized import (
    eight_bit_gather_gemm,
    eight_bit_scatter_gemm,
    row_tiles,
    zero_skipped,
)
from compile_moe.ops.kernels.warp_specialized import gather_gemm as warp_gather
from compile_moe.ops.kernels.warp_specialized import scatter_gemm as warp_scatter
from compile_moe.ops.named_activations import NAMES, program_text
from tests.support.aot import CAPABILITIES, SHARED_MEMORY_BUDGET, CompiledKernel, compile_ahead

# (E, topk, K, I), biased, swigluoai and with weights stored transposed where the model is.
SHAPES = {
    "qwen3-30b": (128, 8, 2048, 768),
    "gpt-oss-120b": (128, 4, 2880, 2880),
    "odd": (7, 2, 77, 51),
    "multiples of 8": (8, 2, 1000, 504),
}


def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def compile_launch(launch: Launch, capability: int, spills: int = 0) -> CompiledKernel:
    options = dict(launch.options)
    compiler = {name: options.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in options}
    if "EARLY" in options:
        options["EARLY"] = capability >= 90
    compiled = compile_ahead(launch.kernel, launch.args, options, capability=capability, **compiler)
    waits = "griddepcontrol.wait" in compiled.ptx
    assert waits == options.get("EARLY", False)
    assert compiled.fits, f"{compiled.shared} bytes of shared memory"
    assert not compiled.may_overwrite_operands
    assert max(compiled.spill_stores, compiled.spill_loads) <= spills, (
        f"{compiled.registers} registers, {compiled.spill_stores} bytes spilled with {compiler} {options}"
    )
    return compiled


def deepest(tiles: tuple[Tile, ...]) -> list[Tile]:
    """Of tiles that differ in their stages, which hardly change a kernel's registers, the one with most of them."""
    by_depth = sorted(tiles, key=lambda tile: tile.num_stages)
    return list({tile._replace(num_stages=0): tile for tile in by_depth}.values())


#: Architectures by shape and precision, without those where another case took no fewer registers and spilled no less
#: (Triton 3.9): of qwen3-30b that is gpt-oss-120b, biased and masked; of "odd" in float32 it is another architecture.
#: "multiples of 8" is for the largest budget of shared memory and for the smallest.
COMPILED = {
    ("gpt-oss-120b", "bf16"): CAPABILITIES,
    ("qwen3-30b", "bf16"): (90, 120),
    ("odd", "bf16"): CAPABILITIES,
    ("multiples of 8", "bf16"): (90, 120),
    ("qwen3-30b", "ieee"): (90,),
    ("odd", "ieee"): (80, 90),
    ("qwen3-30b", "tf32"): (90,),
    ("odd", "tf32"): (80, 100, 120),
}


@pytest.mark.parametrize(
    ("shape", "precision", "capability"),
    [(*case, capability) for case, capabilities in COMPILED.items() for capability in capabilities],
)
def test_gemms(shape: str, precision: str, capability: int) -> None:
    e, topk, k, i = SHAPES[shape]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    kind = "16-bit" if precision == "bf16" else precision
    biased = shape == "gpt-oss-120b"
    program = parse(program_text("swigluoai" if biased else "silu"))
    s = 64 * topk
    # Where elements are loaded or multiplied one by one, the assembler trades a few bytes for occupancy.
    spills = 128 if shape in ("odd", "multiples of 8") else 16 if precision == "ieee" else 0
    limits = DeviceLimits(SHARED_MEMORY_BUDGET[capability], capability in (90, 100))
    x, w1, w2 = empty(64, k, dtype=dtype), empty(e, 2 * i, k, dtype=dtype), empty(e, k, i, dtype=dtype)
    if biased:
        w1, w2 = (empty(e, w.size(2), w.size(1), dtype=dtype).mT for w in (w1, w2))
    slots, offsets = empty(s), empty(e + 1)
    b1 = empty(e, 2 * i, dtype=dtype) if biased else None
    b2 = empty(e, k, dtype=dtype) if biased else None
    for tile in deepest(tile_candidates(dtype.itemsize, i, k, 2, is_vectorized(x, w1), biased, limits)):
        out = empty(s, i, dtype=dtype)
        body = program.triton_source()
        launch = gather_gemm.launch_for(
            tile, out, x, w1, slots, offsets, topk, b1, body, program.layout, False, kind
        )
        compiled = compile_launch(launch, capability, spills)
        if capability == 90 and dtype is torch.bfloat16 and shape in ("qwen3-30b", "gpt-oss-120b"):
            assert compiled.has_wgmma == (tile.block_m >= 64 or tile.swapped), tile
    for tile in deepest(tile_candidates(dtype.itemsize, k, i, 1, is_vectorized(out, w2), biased, limits)):
        launch = scatter_gemm.launch_for(
            tile, empty(s, k, dtype=dtype), out, w2, slots, offsets, b2, False, kind
        )
        compile_launch(launch, capability, spills)


#: K, I, activation, whether biased and transposed, dtype, bytes that may be spilled.
WARP_SPECIALIZED_CASES = {
    "plain": (2048, 768, "silu", False, False, torch.bfloat16, 0),
    "interleaved-biased, transposed": (2880, 2880, "swigluoai", True, True, torch.bfloat16, 0),
    "ungated": (1000, 504, "relu2_no_mul", False, False, torch.float16, 4),
    "an expensive epilogue, odd sizes": (1000, 504, "gelu", True, False, torch.float16, 16),
}


#: Those with less room in the ring have fewer accumulators, whatever the case.
@pytest.mark.parametrize(
    "case, tile",
    [(case, WARP_SPECIALIZED) for case in WARP_SPECIALIZED_CASES]
    + [
        ("plain", WIDE_128),
        ("plain", WARP_SPECIALIZED_64),
        ("ungated", WIDE_64),
        ("ungated", WARP_SPECIALIZED_128),
    ],
)
def test_warp_specialized(case: str, tile: Tile) -> None:
    k, i, activation, biased, transposed, dtype, spills = WARP_SPECIALIZED_CASES[case]
    if tile is WIDE_128:
        spills = 8
    program = parse(program_text(activation))
    n, e, topk, m = 2 * i if program.gated else i, 8, 2, 512
    # Descriptors look at the address.
    x, w1, w2, rows, out = (
        torch.empty(shape, dtype=dtype)
        for shape in ((m, k), (e, n, k), (e, k, i), (m * topk, i), (m * topk, k))
    )
    if transposed:
        w1, w2 = (torch.empty(w.mT.shape, dtype=dtype).mT for w in (w1, w2))
    bias1, bias2 = (empty(e, n, dtype=dtype), empty(e, k, dtype=dtype)) if biased else (None, None)
    slots, offsets = empty(m * topk), empty(e + 1)
    tiles = row_tiles.scratch(slots, e)
    body, layout = program.triton_source(), program.layout
    launches = warp_gather.launches_for(tile, tiles, rows, x, w1, slots, offsets, topk, bias1, body, layout)
    # GEMM 2 knows no activation: the next case has the code of this one's.
    if case != "ungated":
        launches += warp_scatter.launches_for(tile, tiles, out, rows, w2, slots, offsets, bias2)
    for launch in launches:
        compiled = compile_launch(launch, 90, spills)
        assert compiled.has_wgmma == ("gemm" in launch.kernel.__name__)
    for scattered in (False, True):
        compile_launch(zero_skipped.launch_for(out, slots, offsets, e, scattered), 90)


#: K, I, activation, whether biased, what has a scale: a row, the tensor, or a block.
EIGHT_BITS = {
    "plain": (2048, 768, "silu", False, "row"),
    "interleaved-biased, scale of a tensor": (2880, 2880, "swigluoai", True, "tensor"),
    # With a bias fewer bytes are spilled.
    "blocks": (2048, 768, "silu", False, "block"),
    "blocks, interleaved": (2048, 768, "swigluoai", False, "block"),
    "int8": (2048, 768, "silu", False, "row"),
    "int8, interleaved-biased": (2880, 2880, "swigluoai", True, "row"),
}


@pytest.mark.parametrize(
    "case, tile",
    [(case, WARP_SPECIALIZED) for case in EIGHT_BITS]
    + [("blocks", WARP_SPECIALIZED_128), ("plain", WARP_SPECIALIZED_128), ("int8", WARP_SPECIALIZED_64)],
)
def test_warp_specialized_eight_bits(case: str, tile: Tile) -> None:
    k, i, activation, biased, scaled = EIGHT_BITS[case]
    program = parse(program_text(activation))
    n, e, topk, m = 2 * i if program.gated else i, 8, 2, 512
    x, w1, w2, rows = (
        torch.empty(shape, dtype=torch.int8 if case.startswith("int8") else torch.float8_e4m3fn)
        for shape in ((m, k), (e, n, k), (e, k, i), (m * topk, i))
    )
    between, out = (torch.empty(m * topk, columns, dtype=torch.bfloat16) for columns in (i, k))
    shapes: list[tuple[int, ...]] = [(1,), (1,), (e,), (e,)]
    if scaled == "row":
        shapes = [(m, 1), (m * topk, 1), (e, n, 1), (e, k, 1)]
    elif scaled == "block":
        k_blocks, n_blocks, i_blocks = (-(-size // 128) for size in (k, n, i))
        shapes = [(m, k_blocks), (m * topk, i_blocks), (e, n_blocks, k_blocks), (e, k_blocks, i_blocks)]
    x_scale, rows_scale, w1_scale, w2_scale = (torch.empty(shape, dtype=torch.float32) for shape in shapes)
    bias1, bias2 = (torch.empty(e, size, dtype=torch.bfloat16) for size in (n, k)) if biased else (None, None)
    slots, offsets = empty(m * topk), empty(e + 1)
    tiles = row_tiles.scratch(slots, e)
    body, layout = program.triton_source(), program.layout
    block_rows = 128 if scaled == "block" else 0
    first = (x, x_scale, w1, w1_scale, slots, offsets, topk)
    second = (rows, rows_scale, w2, w2_scale, slots, offsets)
    for launch in (
        *eight_bit_gather_gemm.launches_for(tile, tiles, between, *first, bias1, body, layout, block_rows),
        *eight_bit_scatter_gemm.launches_for(tile, tiles, out, *second, bias2, block_rows),
    ):
        # Sums of a step beside those of all: up to 124 bytes with Triton 3.6, 148 with 3.9.
        compiled = compile_launch(launch, 90, spills=152)
        assert compiled.has_wgmma == ("gemm" in launch.kernel.__name__)


@pytest.mark.parametrize("name", NAMES)
def test_epilogues(name: str) -> None:
    program = parse(program_text(name))
    n = 64 if program.gated else 32
    out, gate_up = empty(5, 32, dtype=torch.bfloat16), empty(5, n, dtype=torch.bfloat16)
    compile_launch(act_and_mul.launch_for(out, gate_up, program.triton_source(), program.layout), 90)


@pytest.mark.parametrize("e, mapped", [(128, False), (128, True), (2000, False)])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_sort_and_finalize(capability: int, e: int, mapped: bool) -> None:
    topk, m, k = 8, 600, 2048
    ids = empty(m, topk, dtype=torch.int64)
    expert_map = empty(2 * e, dtype=torch.int64) if mapped else None
    for launches in sort_tokens.launches(empty(m * topk), empty(e + 1), ids, e, expert_map, empty(e + 1)):
        for launch in launches:
            compile_launch(launch, capability)
    fused_out = empty(m, topk, k, dtype=torch.bfloat16)
    out, weights = empty(m, k, dtype=torch.bfloat16), empty(m, topk, dtype=torch.float32)
    compile_launch(
        weight_and_reduce.launch_for(out, fused_out, weights, ids, expert_map, e, True), capability
    )


# E, max_num_tokens, columns, topk, dtype of tokens.
BATCHES = {
    "qwen3-30b": (128, 256, 2048, 8, torch.bfloat16),
    "quantized": (128, 256, 2048, 8, torch.uint8),
    "scales": (128, 256, 16, 8, torch.float32),
    "odd": (7, 33, 77, 3, torch.float32),
    "512-experts": (512, 1024, 2048, 10, torch.bfloat16),
}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("case", BATCHES)
def test_batches(case: str, capability: int) -> None:
    e, rows, k, topk, dtype = BATCHES[case]
    m = 600
    batch, tokens, counts = empty(e, rows, k, dtype=dtype), empty(m, k, dtype=dtype), empty(e)
    batch_rows, order = empty(m, topk), (empty(m * topk), empty(e + 1))
    compile_launch(batch_tokens.launch_for(batch, batch_rows, counts, counts, tokens, *order), capability)
    compile_launch(sort_batch.launch_for(empty(e * rows), empty(e + 1), counts, rows), capability)
    if dtype.is_floating_point:
        out, weights = empty(m, k, dtype=dtype), empty(m, topk, dtype=torch.float32)
        compile_launch(reduce_batch.launch_for(out, batch, weights, batch_rows, True), capability)


# E, topk, scoring, groups, groups of a token.
ROUTERS = {
    "qwen3-30b": (128, 8, "softmax", 1, 1),
    "longcat": (768, 12, "softmax", 1, 1),
    "gpt-oss-120b": (128, 4, "topk_softmax", 1, 1),
    "deepseek-v3": (256, 8, "sigmoid", 8, 4),
    "odd-groups": (35, 3, "sigmoid", 5, 2),
    "one-expert": (1, 1, "softmax", 1, 1),
    "1000-experts-topk32": (1000, 32, "softmax", 1, 1),
}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("router", ROUTERS)
def test_router(router: str, capability: int) -> None:
    e, topk, scoring, num_groups, topk_group = ROUTERS[router]
    if capability != 90 and router not in ("qwen3-30b", "deepseek-v3"):
        pytest.skip("every router for sm_90, two for each architecture")
    m = 5
    logits = empty(m, e, dtype=torch.bfloat16)
    biased = scoring == "sigmoid" or router == "longcat"
    bias = empty(e, dtype=torch.float32) if biased else None
    weights, ids = empty(m, topk, dtype=torch.float32), empty(m, topk, dtype=torch.int64)
    constants = route_tokens.routing_constants(e, topk, scoring, bias, num_groups, topk_group, True)
    arguments = route_tokens.routing_arguments(weights, ids, logits, bias, 2.5)
    compile_launch(route_tokens.launch_for(arguments, constants), capability)
    singles = route_and_sort_tokens.single_launches(empty(m * topk), empty(e + 1), arguments, constants)
    assert singles
    for launch in singles.values():
        compile_launch(launch, capability)
