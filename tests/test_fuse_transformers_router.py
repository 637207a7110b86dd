"""The routers of transformers' models, in every version that is installed: found, with the same results."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from compile_moe.lowering import fuse_router as passes
from compile_moe.lowering.fuse_router import fuse_router
from compile_moe.ops import route_tokens, sort_tokens
from tests.support.fake_cuda import cuda_empty, with_parameters
from tests.support.router_graphs import (
    assert_nothing_left_over,
    kernels_on_a_gpu,
    our_calls,
    reads_topk,
    traced,
)

pytest.importorskip("transformers")

E, TOPK, HIDDEN = 32, 4, 64

#: Of the form of DeepSeek-V3's, with groups.
GROUPED = {
    "axk1": "AXK1TopkRouter",
    "axk2": "AXK2TopkRouter",
    "bailing_hybrid": "BailingHybridTopkRouter",
    "beam": "BeamTopKRouter",
    "deepseek_v3": "DeepseekV3TopkRouter",
    "deepseek_v32": "DeepseekV32TopkRouter",
    "dots1": "Dots1TopkRouter",
    "dots3_note": "Dots3NoteTextTopkRouter",
    "exaone_moe": "ExaoneMoeTopkRouter",
    "glm4_moe": "Glm4MoeTopkRouter",
    "glm4_moe_lite": "Glm4MoeLiteTopkRouter",
    "glm4v_moe": "Glm4vMoeTextTopkRouter",
    "glm5_next": "Glm5NextTextTopkRouter",
    "glm_moe_dsa": "GlmMoeDsaTopkRouter",
    "hy_v4": "HYV4TopkRouter",
    "kimi_linear": "KimiLinearTopkRouter",
    "mimo_v2_flash": "MiMoV2FlashTopkRouter",
    "nemotron_h": "NemotronHTopkRouter",
    "solar_open": "SolarOpenTopkRouter",
}
UNGROUPED = {
    "afmoe": "AfmoeTokenChoiceRouter",
    "ernie4_5_moe": "Ernie4_5_MoeTopKRouter",
    "flint": "FlintTopKRouter",
    "gpt_oss": "GptOssTopKRouter",
    "granitemoe_swa": "GraniteMoeSWATopKRouter",
    "hy_v3": "HYV3TopKRouter",
    "laguna": "LagunaTopKRouter",
    "lfm2_moe": "Lfm2MoeTopKRouter",
    "longcat_flash": "LongcatFlashTopkRouter",
    "minimax": "MiniMaxTopKRouter",
    "minimax_m2": "MiniMaxM2TopKRouter",
    "minimax_m3_vl": "MiniMaxM3VLTopKRouter",
    "mixtral": "MixtralTopKRouter",
    "muse_spark": "MuseSparkTopkRouter",
    "olmoe": "OlmoeTopKRouter",
    "qwen2_moe": "Qwen2MoeTopKRouter",
    "qwen3_5_moe": "Qwen3_5MoeTopKRouter",
    "qwen3_moe": "Qwen3MoeTopKRouter",
    "qwen3_next": "Qwen3NextTopKRouter",
    "step3p7": "Step3p7TopKRouter",
}
#: Chosen by something else than scores + bias, and what a refusal says.
LEFT = {
    "cohere2_moe": ("Cohere2MoeTopKRouter", "no softmax follows"),
    "deepseek_v2": ("DeepseekV2TopkRouter", "is no sum of the two best scores"),
    "inkling": ("InklingTopkRouter", "is no softmax or sigmoid"),
    "kolibri1": ("Kolibri1TopKRouter", "is no softmax or sigmoid"),
    "llama4": ("Llama4Router", "no softmax follows"),
}
FOUND = [
    *((family, name, 1, 1) for family, name in (GROUPED | UNGROUPED).items()),
    *(
        (family, GROUPED[family], *groups)
        for family in ("axk2", "deepseek_v3", "beam")
        for groups in ((4, 1), (4, 2))
    ),
]


def make_router(family: str, name: str, num_groups: int = 1, topk_group: int = 1) -> nn.Module:
    """With a configuration that has what any of them reads."""
    module = pytest.importorskip(f"transformers.models.{family}.modeling_{family}")
    config = SimpleNamespace(
        hidden_size=HIDDEN,
        num_experts=E,
        num_local_experts=E,
        n_routed_experts=E,
        num_experts_per_tok=TOPK,
        n_group=num_groups,
        topk_group=topk_group,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        route_scale=2.5,
        router_scaling_factor=2.5,
        expert_selection_fn="sigmoid",
        topk_method="group_limited_greedy",
        use_expert_bias=True,
        moe_norm_min=1e-12,
        moe_router_logit_softcapping=0.0,
        n_shared_experts=1,
        output_multiplier=0.5,
        router_jitter_noise=0.0,
        zero_expert_num=0,
    )
    if not hasattr(module, name):
        pytest.skip(f"{module.__name__} has no {name}")
    router: nn.Module = getattr(module, name)(config)
    return router.eval()


def call_router(router: nn.Module, tensors: dict[str, Tensor], x: Tensor, bias: Tensor) -> Any:
    """The weights and ids; some versions return logits before them."""
    parameters = inspect.signature(router.forward).parameters
    takes_bias = any(name in parameters for name in ("expert_bias", "e_score_correction_bias"))
    x = x[None] if type(router).__name__.startswith("Afmoe") else x
    results = functional_call(router, tensors, (x, bias) if takes_bias else (x,))
    return results[-2:]


def random_inputs(router: nn.Module) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    tensors = {**dict(router.named_parameters()), **dict(router.named_buffers())}
    random = {name: torch.randn_like(tensor) for name, tensor in tensors.items()}
    return random, torch.randn(40, HIDDEN) / 4, torch.randn(E)


@pytest.mark.parametrize(("family", "name", "num_groups", "topk_group"), FOUND)
def test_found(family: str, name: str, num_groups: int, topk_group: int) -> None:
    router = make_router(family, name, num_groups, topk_group)

    def route(*inputs: Any) -> tuple[Tensor, Tensor]:
        weights, ids = call_router(router, *inputs)
        return weights, ids

    inputs = random_inputs(router)
    passes.refusals.clear()
    with torch.no_grad():
        module = traced(route, *inputs)
        fuse_router(module.graph, "cpu")
        module.graph.lint()
        module.recompile()
        assert passes.refusals == []
        assert our_calls(module) == [route_tokens]
        assert_nothing_left_over(module)
        (weights, ids), expected = module(*inputs), route(*inputs)
    assert (weights.dtype, ids.dtype) == (expected[0].dtype, expected[1].dtype)
    order, expected_order = ids.argsort(-1), expected[1].argsort(-1)
    assert torch.equal(ids.gather(1, order), expected[1].gather(1, expected_order))
    torch.testing.assert_close(
        weights.gather(1, order), expected[0].gather(1, expected_order), rtol=2e-6, atol=1e-9
    )


@pytest.mark.parametrize("family", LEFT)
def test_left(family: str) -> None:
    name, reason = LEFT[family]
    router = make_router(family, name, 4, 2)
    inputs = random_inputs(router)
    if family == "inkling":
        inputs[0]["e_score_correction_bias"] = torch.randn(E)
    passes.refusals.clear()
    with torch.no_grad():
        module = traced(lambda *args: call_router(router, *args), *inputs)
    fuse_router(module.graph, "cpu")
    assert our_calls(module) == []
    assert any(reason in refusal for refusal in passes.refusals), passes.refusals


#: How many kernels inductor generates besides the op and the router's GEMM, in float32 and in bfloat16: a cast of the
#: weights where the model has one and nobody fuses it, and casts of the GEMM's arguments. Weights to be cast are made
#: in bfloat16, as a checkpoint may have them: some classes of transformers 5.24 make them in float32.
KERNELS = {
    "mixtral": (0, 0),
    "qwen3_moe": (0, 1),
    "olmoe": (0, 1),
    "gpt_oss": (0, 1),
    "deepseek_v3": (0, 2),
    "glm4_moe": (0, 2),
    "minimax_m2": (0, 0),
    # What is divided by a sum in bfloat16, or by a sum that is clamped.
    "lfm2_moe": (0, 1),
    "ernie4_5_moe": (1, 3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", KERNELS)
def test_kernels_on_a_gpu(family: str, dtype: torch.dtype) -> None:
    name = (GROUPED | UNGROUPED)[family]
    made: list[nn.Module] = []

    def make_arguments() -> tuple[Tensor, Tensor]:
        torch.set_default_dtype(dtype)
        try:
            with torch.device("cuda"):
                made.append(with_parameters(make_router(family, name), dtype))
        finally:
            torch.set_default_dtype(torch.float32)
        return cuda_empty(48, HIDDEN, dtype=dtype), cuda_empty(E, dtype=torch.float32)

    def route(x: Tensor, bias: Tensor) -> Any:
        return call_router(made[-1], {}, x, bias)

    def route_and_sort(x: Tensor, bias: Tensor) -> Any:
        weights, ids = route(x, bias)
        return weights, *sort_tokens(ids, E)

    functions = ((route, "route_tokens"), (route_and_sort, "route_and_sort_tokens"))
    # Sorting looks at no dtype.
    for function, op in functions if dtype is torch.bfloat16 else functions[:1]:
        kernels = kernels_on_a_gpu(function, make_arguments, shape_padding=False)
        assert len(kernels.triton_kernels) == KERNELS[family][dtype is torch.bfloat16], kernels.triton_kernels
        assert kernels.op_calls == [op]
        assert not reads_topk(kernels) and len(kernels.extern_calls) == 2, kernels.extern_calls
