"""What explain says about a compile, and what the command makes of it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from typer.testing import CliRunner, Result

import compile_moe
from compile_moe.cli import app
from compile_moe.lowering import fuse_epilogue
from compile_moe.lowering.explain import Explanation
from compile_moe.lowering.scheduled_kernels import scheduled_kernels
from compile_moe.ops import weight_and_reduce
from tests.support.fake_cuda import cuda_empty, fake_cuda
from tests.support.oracle import make_layer

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

SIZES = ["--hidden-size", "64", "--intermediate-size", "32", "--num-experts", "8", "--topk", "2"]


def clamped(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate.clamp(max=7)) * up


def accumulated(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate.cumsum(-1)) * up


def explain_block(activation: Any) -> Explanation:
    layer = make_layer()

    def block(x: Tensor, *rest: Tensor) -> Tensor:
        y = compile_moe.fused_experts(x * 2, *rest, activation=activation)
        return F.rms_norm(x + y, (x.size(-1),))

    return compile_moe.explain(block, *layer.args)


def test_kernels_in_order() -> None:
    kernels, refusals = explain_block(clamped)
    names = [kernel.name for kernel in kernels]
    # The product and the sort don't depend on one another.
    assert sorted(names[:2]) == ["", "compile_moe.sort_tokens"]
    assert names[2:] == ["compile_moe.gather_gemm", "compile_moe.scatter_gemm", ""]
    assert kernels[-1].kind == "generated"
    assert {"compile_moe.weight_and_reduce", "add", "rsqrt"} <= set(kernels[-1].operations)
    gemm = kernels[names.index("compile_moe.gather_gemm")]
    assert (gemm.kind, gemm.operations) == ("op", ("compile_moe.gather_gemm",))
    assert gemm.epilogue.startswith("concatenated; t0 = minimum(gate, 7.0); ")
    assert refusals == ()


def test_refusal_names_the_line() -> None:
    kernels, refusals = explain_block(accumulated)
    assert all(kernel.epilogue == "" for kernel in kernels)
    assert "aten.cumsum" in [kernel.name for kernel in kernels]
    (refusal,) = refusals
    line = accumulated.__code__.co_firstlineno + 2
    code = f"`return F.silu(gate.cumsum(-1)) * up`, line {line} of test_explain.py"
    reason = "is not a pointwise operation an epilogue can hold"
    assert refusal == f"activation behind gather_gemm: cumsum ({code}) {reason}"
    # The next compile starts anew.
    assert explain_block(clamped).refusals == ()


def test_router_on_a_cpu() -> None:
    layer = make_layer(topk=2, E=8)

    def block(x: Tensor, w1: Tensor, w2: Tensor, logits: Tensor) -> Tensor:
        weights, ids = logits.softmax(-1).topk(2)
        return compile_moe.fused_experts(x, w1, w2, weights, ids)

    x, w1, w2, *_ = layer.args
    (refusal,) = compile_moe.explain(block, x, w1, w2, torch.randn(x.size(0), 8)).refusals
    assert refusal.startswith("router at topk (`weights, ids = logits.softmax(-1).topk(2)`, line ")
    assert refusal.endswith(": it is on cpu; route_tokens saves kernels on cuda only")


def test_nothing_to_refuse() -> None:
    layer = make_layer()
    refusals = compile_moe.explain(lambda *args: compile_moe.fused_experts(*args) + 1, *layer.args).refusals
    assert refusals == ()


def explain_on_a_gpu(function: Callable[..., Any], k: int) -> Explanation:
    """For a layer's finalize on a GPU that is not there, 16 tokens, 8 experts a token."""
    with fake_cuda(), FakeTensorMode(shape_env=ShapeEnv()):
        fused_out, weights = cuda_empty(16, 8, k), cuda_empty(16, 8, dtype=torch.float32)
        return compile_moe.explain(function, fused_out, weights, cuda_empty(16, k), cuda_empty(k, 64))


def norm_behind(fused_out: Tensor, weights: Tensor, residual: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(weight_and_reduce(fused_out, weights) + residual, residual.shape[-1:])


def quantized_behind(*arguments: Tensor) -> tuple[Tensor, Tensor]:
    groups = norm_behind(*arguments).unflatten(-1, (-1, 128)).float()
    scales = groups.abs().amax(-1, keepdim=True) / 448
    return groups / scales, scales


def product_between(fused_out: Tensor, weights: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Nothing that could be merged: the second norm has to wait for the product."""
    h = norm_behind(fused_out, weights, residual, w)
    return F.rms_norm(h @ w, (64,)) + h[:, :64], (residual @ w).relu() @ w.t()


@pytest.mark.parametrize(
    ("function", "k", "reasons"),
    [
        (norm_behind, 2048, []),
        (product_between, 2048, []),
        (
            quantized_behind,
            2048,
            ["amax of (16, 16, 128) goes over other elements than mean of (16, 2048)"],
        ),
        (norm_behind, 16384, ["inductor splits mean of (16, 16384)"] * 2),
    ],
    ids=["one-kernel", "product-between", "groups", "split"],
)
def test_kernels_apart_from_finalize(function: Callable[..., Any], k: int, reasons: list[str]) -> None:
    kernels, refusals = explain_on_a_gpu(function, k)
    assert len(refusals) == len(reasons), refusals
    for refusal, reason in zip(refusals, reasons, strict=True):
        assert refusal.startswith("finalize: ") and refusal.endswith(f" in another kernel, since {reason}")
    if function is not product_between:
        assert [kernel.kind for kernel in kernels] == ["generated"] * (1 + len(reasons))


def test_refusals_of_a_thread_are_its_own() -> None:
    fuse_epilogue.refusals.clear()

    def compile_another() -> None:
        # From a cache, the graph comes as the passes left it, without their reasons.
        with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
            layer = make_layer()
            torch.compile(compile_moe.fused_experts)(*layer.args, activation=accumulated)
        found.extend(fuse_epilogue.refusals)

    found: list[str] = []
    thread = threading.Thread(target=compile_another)
    thread.start()
    thread.join()
    assert len(found) == 1 and fuse_epilogue.refusals == []


def test_other_threads_compile_meanwhile() -> None:
    """explain stops its own compile, and names its own kernels."""
    compiled: list[Tensor] = []

    def compile_another() -> None:
        compiled.append(torch.compile(lambda x: x.sin() + 1)(torch.zeros(3)))

    with scheduled_kernels() as kernels:
        thread = threading.Thread(target=compile_another)
        thread.start()
        thread.join()
        torch.compile(lambda x: x.cos() * 2)(torch.zeros(3))
    assert compiled[0].tolist() == [1, 1, 1]
    assert [kernel.operations for kernel in kernels] == [("cos", "mul")]


def test_what_does_not_compile_says_so() -> None:
    def breaks(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x + 1

    with pytest.raises(torch._dynamo.exc.Unsupported):
        compile_moe.explain(breaks, torch.randn(3))


def test_nothing_runs_and_nothing_is_left_behind() -> None:
    calls: list[int] = []

    @torch.library.custom_op("compile_moe_tests::count_calls", mutates_args=())
    def count_calls(x: Tensor) -> Tensor:
        calls.append(1)
        return x.clone()

    count_calls.register_fake(torch.empty_like)
    function = torch.compile(lambda x: count_calls(x) + 1)
    kernels, _ = compile_moe.explain(function, torch.zeros(3))
    assert [kernel.name for kernel in kernels] == ["compile_moe_tests.count_calls", ""] and calls == []
    # Compiled for use afterwards, it runs.
    assert function(torch.zeros(3)).tolist() == [1, 1, 1] and calls == [1]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["explain", "--device", "cpu", *arguments], env={"COLUMNS": "200"})


def test_an_edited_activation_changes_the_output(tmp_path: Path) -> None:
    file, svg, html = (tmp_path / name for name in ("own_gate.py", "picture.svg", "page.html"))
    source = """
def gate(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return gate.sigmoid() * up
"""
    file.write_text(source)
    arguments = [*SIZES, "--activation", f"{file}:gate"]
    before = run(*arguments, "--svg", str(svg), "--html", str(html))
    file.write_text(source.replace("gate.sigmoid()", "gate.flip(0)"))
    after = run(*arguments)
    assert before.exit_code == after.exit_code == 0, (before.output, after.output)
    assert "t0 = sigmoid(gate)" in before.stdout and "is not a pointwise" not in before.stdout
    assert "t0 = sigmoid(gate)" not in after.stdout
    assert "rev (`return gate.flip(0) * up`, line 4 of own_gate.py) is not a pointwise" in " ".join(
        after.stdout.replace("│", " ").split()
    )
    assert svg.read_text().startswith("<svg")
    for file in (svg, html):
        text = file.read_text().replace("&#160;", " ")
        assert "compile_moe.gather_gemm" in text and "sigmoid(gate)" in text


def test_a_model_folder_and_another_implementation(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GptOssConfig(
        hidden_size=64, intermediate_size=32, num_local_experts=4, num_hidden_layers=1
    )
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "gpt_oss"
    ours = run("--model", str(tmp_path), "--tokens", "1", "--dtype", "bfloat16")
    theirs = run("--model", str(tmp_path), "--experts", "grouped_mm", "--static")
    assert ours.exit_code == theirs.exit_code == 0, (ours.output, theirs.output)
    assert "GptOssMLP" in ours.stdout and "epilogue, over interleaved gate and up" in ours.stdout
    assert "bfloat16" in ours.stdout and "compile_moe.scatter_gemm" in ours.stdout
    assert "compile_moe." not in theirs.stdout and "grouped_mm" in theirs.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 16])
@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss", "DeepseekV3"])
def test_router_on_a_gpu(family: str, tokens: int, tmp_path: Path) -> None:
    """A model's own router becomes one op, with the sort where experts of one token don't do without."""
    transformers = pytest.importorskip("transformers")
    experts = {"num_local_experts": 16} if family == "GptOss" else {"num_experts": 16}
    if family == "DeepseekV3":
        experts = {"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 0}
    config = getattr(transformers, f"{family}Config")(hidden_size=64, num_experts_per_tok=4, **experts)
    config.save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["explain", "--model", str(tmp_path), "--tokens", str(tokens)])
    assert result.exit_code == 0, result.output
    unsorted = tokens == 1 and family != "GptOss"
    router = "compile_moe.route_tokens" if unsorted else "compile_moe.route_and_sort_tokens"
    assert router in result.stdout and "aten.topk" not in result.stdout
    assert ("compile_moe.one_token_experts" in result.stdout) is unsorted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "--tokens must be at least 1, got 0"),
        (["--topk", "2"], "--hidden-size, --intermediate-size, --num-experts is missing"),
        (["--model", "mixtral-8x7b", *SIZES], "--model or a shape of your own, not both"),
        ([*SIZES[:-1], "9"], "--topk must be at most --num-experts, got 9 of 8"),
        ([*SIZES, "--activation", "fast"], "--activation must be FILE.py:FUNCTION or one of silu, gelu, "),
        ([*SIZES, "--activation", "no.py:gate"], "--activation must name a Python file, but no.py is none"),
        ([*SIZES, "--activation", f"{__file__}:no_gate"], "has no function no_gate"),
        ([*SIZES, "--experts", "no_experts"], "no_experts"),
        ([*SIZES, "--svg", "no-such-folder/picture.svg"], "can't be written: No such file or directory"),
    ],
    ids=lambda value: value[-1].rpartition("/")[2] if isinstance(value, list) else "",
)
def test_refusals(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split()), result.output
