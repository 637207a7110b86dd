"""Every kernel on hostile shapes, for compute-sanitizer; a program rather than a test:

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m tests.hostile_shapes

Arguments name a part of it (layers, batched, many_rows, quantized, routing, one_token, compiled) and a share of its
cases (`layers 0 3` is every third), to run them side by side: the sanitizer rewrites each kernel on one core. Without
the caching allocator each tensor is an allocation of its own, so that an overrun of one is seen.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._inductor import config as inductor_config

import compile_moe
from compile_moe import FusedMoEModularKernel, MoEPrepareAndFinalizeNoEP, TritonExperts
from compile_moe.ops import act_and_mul, batch_tokens, quantize_tokens, route_and_sort_tokens, route_tokens
from compile_moe.ops.kernels import launch
from compile_moe.ops.kernels.tiles import SIXTEEN_BIT_TILES, WARP_SPECIALIZED_TILES
from compile_moe.ops.named_activations import program_text
from tests.support.batched import PoisonedParts, batched_kernel, kept, options_of
from tests.support.one_token import run_one_token
from tests.support.oracle import CASES, assert_as_accurate, make_layer
from tests.support.quantized import Variant, make_quantized
from tests.support.quantized import assert_as_accurate as assert_quantized_as_accurate
from tests.support.quantized_gemms import ALL_VARIANTS, GEMMS, Gemms, spread
from tests.support.quantized_inputs import op as overload
from tests.support.quantized_one_token import VARIANTS as ONE_TOKEN_VARIANTS
from tests.support.quantized_one_token import run_one_token as run_quantized_one_token
from tests.support.token_inputs import SCALINGS
from tests.support.warp_specialized import (
    EIGHT_BIT_LAYERS,
    LAYERS,
    assert_both_were_launched,
    launched,
    warp_specialized_wherever_possible,
)

SIZES: tuple[dict[str, Any], ...] = (
    {},
    {"M": 1, "K": 1, "I": 1},
    {"M": 33, "K": 65, "I": 17},
    {"M": 700, "K": 129, "I": 31, "E": 9, "topk": 7},
    # Rows that start at multiples of 16 bytes: the kernels that load by vectors.
    {"M": 2, "K": 64, "I": 24},
    {"M": 150, "K": 136, "I": 72, "E": 3},
    {"M": 900, "K": 64, "I": 264, "E": 4, "topk": 2},
)
Share = Callable[[Iterable[Any]], Iterator[Any]]
EIGHT_BIT_SCHEMES = "fp8_w8a8_channel", "fp8_w8a8_tensor", "fp8_w8a8_block", "int8_w8a8_channel"
MANY_SIZES = ("plain", "transposed", "biased", "mapped", "skipped", "strided")


class OwnFinalize(MoEPrepareAndFinalizeNoEP):
    """Reads every slot, so that the experts must fill those that are skipped."""

    def finalize(self, output: Tensor, fused_expert_output: Tensor, *args: Any) -> None:
        super().finalize(output, fused_expert_output, *args)


def row_softmax(gate_up: Tensor) -> Tensor:
    """No epilogue: runs between the GEMMs."""
    gate, up = gate_up.chunk(2, -1)
    return gate.softmax(-1) * up


def layers(device: str, share: Share) -> int:
    count = 0
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    for dtype, (name, case) in share(itertools.product(dtypes, CASES.items())):
        for size in SIZES if name in MANY_SIZES else ({},):
            layer = make_layer(**{**case, **size}, dtype=dtype, device=device)
            assert_as_accurate(compile_moe.fused_experts(*layer.args, **layer.options), layer)
            count += 1
    for case in share(("skipped", "skipped-mapped", "M0")):
        layer = make_layer(**CASES[case], dtype=torch.bfloat16, device=device)
        kernel = FusedMoEModularKernel(OwnFinalize(), TritonExperts())
        assert_as_accurate(kernel(*layer.args, expert_map=layer.expert_map), layer)
        layer = make_layer(
            **CASES[case], dtype=torch.bfloat16, device=device, activation=row_softmax, function=row_softmax
        )
        assert_as_accurate(compile_moe.fused_experts(*layer.args, **layer.options), layer)
        count += 2
    return count


def many_rows(device: str, share: Share) -> int:
    """The warp-specialized GEMMs, on Hopper."""
    if torch.cuda.get_device_capability(device)[0] != 9:
        return 0
    count = 0
    for tile in SIXTEEN_BIT_TILES:
        with warp_specialized_wherever_possible(tile):
            for case, dtype in share(itertools.product(LAYERS.values(), (torch.bfloat16, torch.float16))):
                layer = make_layer(**case, dtype=dtype, device=device)
                assert_as_accurate(compile_moe.fused_experts(*layer.args, **layer.options), layer)
                count += 1
    for tile in WARP_SPECIALIZED_TILES:
        with warp_specialized_wherever_possible(tile):
            for scheme, name in share(itertools.product(("int8_w8a16", "int4_w4a16"), ("K", "I"))):
                sizes = {"M": 300, "K": 160, "I": 96, "E": 4} | {name: 544}
                q = make_quantized(Variant(scheme), **sizes, biased=True, skipped=True, dtype=torch.bfloat16)
                args, options = q.on_gpu()
                launch._ready.clear()
                assert_quantized_as_accurate(compile_moe.fused_experts(*args, **options).cpu(), q)
                assert {"decoding_gather_gemm_kernel", "decoding_scatter_gemm_kernel"} <= set(launched())
                count += 1
    with warp_specialized_wherever_possible():
        layer = make_layer(M=700, K=128, I=64, E=4, skipped=True, dtype=torch.bfloat16, device=device)
        kernel = FusedMoEModularKernel(OwnFinalize(), TritonExperts())
        assert_as_accurate(kernel(*layer.args), layer)
        layer.topk_ids.fill_(-1)
        assert_as_accurate(compile_moe.fused_experts(*layer.args), layer)
        assert_both_were_launched()
    for tile, case, scheme in share(
        itertools.product(WARP_SPECIALIZED_TILES, EIGHT_BIT_LAYERS.values(), EIGHT_BIT_SCHEMES)
    ):
        if "block" in scheme:
            # Tiles of gate and up, each of one block.
            case = {**case, "I": -(-case["I"] // 64) * 64}
        with warp_specialized_wherever_possible(tile):
            q = make_quantized(Variant(scheme), **case, dtype=torch.bfloat16)
            args, options = q.on_gpu()
            assert_quantized_as_accurate(compile_moe.fused_experts(*args, **options).cpu(), q)
            assert {"eight_bit_gather_gemm_kernel", "eight_bit_scatter_gemm_kernel"} <= set(launched())
        count += 1
    return count + 2


def quantized_gemms(device: str, share: Share) -> int:
    """Each scheme with operands in allocations of their own, packed and spread out."""
    count = 0
    float8 = torch.cuda.get_device_capability(device) >= (8, 9)
    sizes: tuple[dict[str, Any], ...] = {"M": 3}, {"M": 150, "K": 136, "I": 72}
    for variant, size in share(itertools.product(ALL_VARIANTS.values(), sizes)):
        if variant.made.weight_dtype is torch.float8_e4m3fn and not float8:
            continue
        gemms = Gemms(make_quantized(variant, biased=True, skipped=True, dtype=torch.bfloat16, **size))
        for stage, place in itertools.product(GEMMS, (lambda t: t, spread)):
            arguments = [
                a
                if not isinstance(a, Tensor)
                else a.to(device)
                if a.dtype is torch.int32
                else place(a.to(device))
                for a in gemms.inputs[stage]
            ]
            gemms.check(stage, overload(stage)(*arguments).cpu())
            count += 1
    return count


def ids_far_out_of_range(device: str) -> None:
    """More slots than one launch sorts; and what a corrupt map would hold. On a CPU these raise."""
    for mapped in (False, True):
        layer = make_layer(M=3000, K=16, I=16, E=300, topk=3, mapped=mapped, device=device)
        layer.topk_ids[::7] = 2**40
        layer.topk_ids[1::7] = -(2**40)
        compile_moe.fused_experts(*layer.args, **layer.options)
        few = make_layer(M=5, mapped=True, device=device)
        few.expert_map[::2] = 2**31 - 1  # type: ignore[index]
        few.expert_map[1::4] = -7  # type: ignore[index]
        compile_moe.fused_experts(*few.args, **few.options)


def routing(device: str, share: Share) -> int:
    """Routers, sorts, and the activation as an op of its own."""
    count = 0
    shapes = (1, 1), (3, 2), (35, 5), (128, 8), (512, 10)
    for m, (e, topk) in share(itertools.product((1, 7, 65, 600), shapes)):
        for dtype, scoring in itertools.product((torch.bfloat16, torch.float32), ("softmax", "topk_softmax")):
            logits = torch.randn(m, e, device=device, dtype=dtype)
            for op in (route_tokens, route_and_sort_tokens):
                op(logits, topk, scoring)
        bias = torch.randn(e, device=device)
        groups = 5 if e == 35 else 1
        for op in (route_tokens, route_and_sort_tokens):
            op(torch.randn(m, e, device=device), topk, "sigmoid", bias, groups, max(1, groups - 1), True, 2.5)
        count += 10
    for columns in share((2, 34, 2050)):
        act_and_mul(torch.randn(3, columns, device=device), program_text("silu"))
        count += 1
    ids_far_out_of_range(device)
    return count + 4


def one_token(device: str, share: Share) -> int:
    """The op that compiled graphs of one token call."""
    count = 0
    for dtype, (name, case) in share(itertools.product((torch.bfloat16, torch.float32), CASES.items())):
        for size in SIZES if name in MANY_SIZES else ({},):
            layer = make_layer(**{**case, **size, "M": 1}, dtype=dtype, device=device)
            assert_as_accurate(run_one_token(layer), layer)
            count += 1
    float8 = torch.cuda.get_device_capability(device) >= (8, 9)
    for variant, topk in share(itertools.product(ONE_TOKEN_VARIANTS.values(), (1, 3, 8, 16))):
        if variant.made.weight_dtype is torch.float8_e4m3fn and not float8:
            continue
        sizes: dict[str, Any] = {"M": 1, "E": 16, "topk": topk, "K": 160 * topk, "I": 96, "biased": True}
        q = make_quantized(variant, **sizes, skipped=topk == 8, dtype=torch.bfloat16)
        assert_quantized_as_accurate(run_quantized_one_token(q), q)
        count += 1
    layer = make_layer(M=1, E=4, topk=2, dtype=torch.bfloat16, device=device)
    layer.topk_ids[0] = torch.tensor([2**40, -(2**40)], device=device)
    assert not run_one_token(layer).any()
    q = make_quantized(Variant("int8_w8a16"), M=1, E=4, topk=2, K=64, I=64, dtype=torch.bfloat16)
    q.layer.topk_ids[0] = torch.tensor([2**40, -(2**40)])
    assert not run_quantized_one_token(q).any()
    return count + 2


def compiled(device: str, share: Share) -> int:
    """What inductor makes of finalize, map included."""
    count = 0
    with torch.no_grad():
        for case in share(("skipped", "skipped-mapped")):
            torch._dynamo.reset()
            layer = make_layer(**CASES[case], dtype=torch.bfloat16, device=device)
            function = torch.compile(compile_moe.fused_experts, fullgraph=True)
            assert_as_accurate(function(*layer.args, **layer.options), layer)
            count += 1
    return count


@contextmanager
def loading_only_what_runs() -> Iterator[None]:
    """Not the kernels of other numbers of tokens, each of which the sanitizer would rewrite."""
    load = launch._load

    def load_launches(plan: launch.Plan, device: torch.device) -> dict[Hashable, Any]:
        key = (*plan.key, *map(launch._variant, plan.launches))
        return load(launch.Plan(key, plan.launches, lambda: plan.launches), device)

    with mock.patch.object(launch, "_load", load_launches):
        yield


def batched(device: str, share: Share) -> int:
    """The batched format, with room for few and for all, each tensor in an allocation of its own."""
    count = 0
    for name, rows in share(itertools.product(CASES, (1, 3, 70))):
        layer = make_layer(**CASES[name], dtype=torch.bfloat16, device=device)
        kernel = batched_kernel(layer, rows, parts=PoisonedParts)
        assert_as_accurate(kernel(*layer.args, **options_of(layer)), kept(layer, rows).layer)
        count += 1
    for scaling in share(SCALINGS):
        if scaling.startswith("float8") and torch.cuda.get_device_capability(device) < (8, 9):
            continue
        for num_rows in (0, 5, 3000, 2**31 - 1):
            offsets = torch.tensor([0, num_rows], dtype=torch.int32, device=device)
            quantize_tokens(torch.randn(3000, 130, device=device), scaling, None, None, offsets)
            count += 1
    layer = make_layer(M=4, E=3, device=device)
    for bounds in ([0, 90, 3, -5], [7, 6, 5, 4], [-(2**31), 2**31 - 1, 2, 99]):
        slots = torch.tensor([0, -7, 99, 2**31 - 1, 3, 4, 5, 7], dtype=torch.int32, device=device)
        offsets = torch.tensor(bounds, dtype=torch.int32, device=device)
        batch_tokens(layer.hidden_states, slots, offsets, 2, 3)
    return count + 3


PARTS: dict[str, Callable[[str, Share], int]] = {
    "layers": layers,
    "batched": batched,
    "many_rows": many_rows,
    "quantized": quantized_gemms,
    "routing": routing,
    "one_token": one_token,
    "compiled": compiled,
}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("part", nargs="?", choices=PARTS, help="to run parts side by side; all by default")
    parser.add_argument("first", nargs="?", type=int, default=0, help="of the cases of that part")
    parser.add_argument("step", nargs="?", type=int, default=1, help="to the next of them")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("needs a CUDA device")
        return 2

    def share(cases: Iterable[Any]) -> Iterator[Any]:
        return itertools.islice(cases, options.first, None, options.step)

    with loading_only_what_runs(), inductor_config.patch(compile_threads=1):
        for name in [options.part] if options.part else PARTS:
            print(f"{name}: {PARTS[name]('cuda', share)} cases ran", flush=True)
    torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
