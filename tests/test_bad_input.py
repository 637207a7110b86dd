"""Wrong arguments of the layer: the error says what was given and what is accepted, and the fake raises the same."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

import compile_moe
from compile_moe import (
    Activation,
    FusedMoEModularKernel,
    MoEPrepareAndFinalizeNoEP,
    TorchExperts,
    TritonExperts,
)
from tests.support.oracle import make_layer

# M = 9, K = 48, I = 40, N = 80, E = 5, topk = 2
NAMES = ("hidden_states", "w1", "w2", "topk_weights", "topk_ids")
BIASES = ("w1_bias", "w2_bias")


def kernel_of(experts: type[Any]) -> Callable[..., Tensor]:
    def call(
        *args: Tensor, w1_bias: Tensor | None = None, w2_bias: Tensor | None = None, **options: Any
    ) -> Tensor:
        kernel = FusedMoEModularKernel(MoEPrepareAndFinalizeNoEP(), experts(w1_bias, w2_bias))
        result: Tensor = kernel(*args, **options)
        return result

    return call


CALLERS: dict[str, Callable[..., Tensor]] = {
    "function": compile_moe.fused_experts,
    "triton-kernel": kernel_of(TritonExperts),
    "torch-kernel": kernel_of(TorchExperts),
}

#: Argument changed, the new value as a function of the old one, the error, what its message says.
Change = tuple[str, Callable[[Any], Any], type[Exception], str]


def all_to(dtype: torch.dtype) -> Callable[[Any], Any]:
    return lambda t: t.to(dtype)


def given(value: Any) -> Callable[[Any], Any]:
    return lambda _: value


def meta(t: Tensor) -> Tensor:
    return t.to("meta")


# fmt: off
CHANGES: dict[str, Change] = {
    "x-1d": ("hidden_states", lambda t: t[0], ValueError, r"hidden_states must be \(M, K\), got \(48,\)"),
    "x-3d": ("hidden_states", lambda t: t[None], ValueError, r"\(M, K\), got \(1, 9, 48\); flatten"),
    "x-batched": ("hidden_states", lambda t: t.new_zeros(5, 9, 48), ValueError, r"got \(5, 9, 48\).*prepare makes"),
    "w1-2d": ("w1", lambda t: t[0], ValueError, r"w1 must be \(E, N, K\).* got \(80, 48\)"),
    "w2-2d": ("w2", lambda t: t[0], ValueError, r"w2 \(E, K, I\), got \(5, 80, 48\) and \(48, 40\)"),
    "ids-1d": ("topk_ids", lambda t: t[:, 0], ValueError, r"topk_ids must be \(M, topk\), got \(9,\)"),
    "weights-1d": ("topk_weights", lambda t: t[:, 0], ValueError, r"topk_weights must .*\(9, 2\), got \(9,\)"),
    "fewer-experts": ("w2", lambda t: t[:3], ValueError, r"same number of experts, got .*\(5, .* w2 \(3, 48, 40\)"),
    "no-experts": ("w2", lambda t: t[:0], ValueError, r"same number of experts, got .* w2 \(0, 48, 40\)"),
    "K-of-x": ("hidden_states", lambda t: t[:, :40], ValueError, r"agree in K, got \(9, 40\), \(5, 80, 48\)"),
    "K-of-w1": ("w1", lambda t: t[..., :40], ValueError, r"agree in K, got \(9, 48\), \(5, 80, 40\)"),
    "K-of-w2": ("w2", lambda t: t[:, :40], ValueError, r"agree in K, got .* \(5, 40, 40\)"),
    "I-of-w2": ("w2", lambda t: t[..., :30], ValueError, r"N = 2 \* I .*'silu'.* \(5, 80, 48\) and \(5, 48, 30\)"),
    "odd-N": ("w1", lambda t: t[:, :79], ValueError, r"even .*got 79|N = 2 \* I .* got \(5, 79, 48\)"),
    "ungated-N": ("activation", given("silu_no_mul"), ValueError, r"N = I .*silu_no_mul.* got \(5, 80, 48\)"),
    "fewer-ids": ("topk_ids", lambda t: t[:4], ValueError, r"topk_ids must .*9 rows, got \(4, 2\)"),
    "fewer-weights": ("topk_weights", lambda t: t[:4], ValueError, r"shape of topk_ids, \(9, 2\), got \(4, 2\)"),
    "weights-of-topk1": ("topk_weights", lambda t: t[:, :1], ValueError, r"\(9, 2\), got \(9, 1\)"),
    "mixed-x": ("hidden_states", all_to(torch.half), TypeError, r"must have the dtype of .*float16, got .*float32"),
    "mixed-w1": ("w1", all_to(torch.bfloat16), TypeError, r"must have the dtype of .*float32, got torch\.bfloat16"),
    "mixed-w2": ("w2", all_to(torch.bfloat16), TypeError, r"must have the dtype of .*float32, got torch\.bfloat16"),
    "fp8-w1": ("w1", all_to(torch.float8_e4m3fn), TypeError, r"w1 must be .*16 bits.*got .*e4m3fn.*quant_config=comp"),
    "uint8-w2": ("w2", all_to(torch.uint8), TypeError, r"w2 must be .*16 bits.*got torch.uint8.*dequantize_weights"),
    "transposed-w1": ("w1", lambda t: t.transpose(1, 2), ValueError, r"agree in K.* go in as w.transpose\(1, 2\)"),
    "int-x": ("hidden_states", all_to(torch.int32), TypeError, r"must be one of .*bfloat16.* got torch\.int32"),
    "fp8-x": ("hidden_states", all_to(torch.float8_e5m2), TypeError, r"must be one of .*bfloat16.* got .*float8"),
    "int-weights": ("topk_weights", all_to(torch.int64), TypeError, r"topk_weights .*floating point, got torch.int64"),
    "int16-ids": ("topk_ids", all_to(torch.int16), TypeError, r"topk_ids must be int32 or int64, got torch.int16"),
    "float-ids": ("topk_ids", all_to(torch.float32), TypeError, r"topk_ids must be int32 or int64, got .*float32"),
    "x-elsewhere": ("hidden_states", meta, ValueError, r"device of hidden_states, meta, got cpu"),
    "w1-elsewhere": ("w1", meta, ValueError, r"w1 must be on the device of hidden_states, cpu, got meta"),
    "w2-elsewhere": ("w2", meta, ValueError, r"w2 must be on the device of hidden_states, cpu, got meta"),
    "weights-elsewhere": ("topk_weights", meta, ValueError, r"topk_weights must be on .*, cpu, got meta"),
    "ids-elsewhere": ("topk_ids", meta, ValueError, r"topk_ids must be on .*, cpu, got meta"),
    "map-elsewhere": ("expert_map", given(torch.arange(5, device="meta")), ValueError, r"expert_map .*got meta"),
    "map-2d": ("expert_map", given(torch.zeros(1, 5).int()), ValueError, r"\(global_num_experts,\), got \(1, 5\)"),
    "map-float": ("expert_map", given(torch.zeros(5)), TypeError, r"expert_map must be int32 or int64, got .*float32"),
    "map-empty": ("expert_map", given(torch.arange(0)), ValueError, r"topk must be at most .* 0, got 2"),
    "global-experts": ("global_num_experts", given(7), ValueError, r"global_num_experts must be .*, 5, .*got 7"),
    "topk-0": ("topk_ids", lambda t: t[:, :0], ValueError, r"topk_ids .* topk at least 1, got \(9, 0\)"),
    "on-input-topk2": ("apply_router_weight_on_input", given(True), ValueError, r"needs topk = 1, got topk = 2"),
    "unknown-activation": ("activation", given("swish"), ValueError, r"one of silu, .* a callable, got 'swish'"),
    "activation-class": ("activation", given(compile_moe.Activation), TypeError, r"the class Activation; pass an obj"),
    "no-activation": ("activation", given(None), TypeError, r"a name, .* or a callable, got NoneType"),
    "w1_bias": ("w1_bias", given(torch.zeros(5, 79)), ValueError, r"w1_bias must be .*\(5, 80\), got \(5, 79\)"),
    "w1_bias-broadcast": ("w1_bias", given(torch.ones(5, 1)), ValueError, r"w1_bias must be .*\(5, 80\), got \(5, 1\)"),
    "w2_bias": ("w2_bias", given(torch.zeros(7, 48)), ValueError, r"w2_bias must be .*\(5, 48\), got \(7, 48\)"),
    "w1_bias-double": ("w1_bias", given(torch.zeros(5, 80).double()), TypeError, r"bias must have .*got torch.float64"),
    "w2_bias-elsewhere": ("w2_bias", given(torch.zeros(5, 48, device="meta")), ValueError, r"bias must .*got meta"),
    "row-sum": ("activation", given(lambda x: x.sum(-1)), ValueError, r"\(S, I\) = \(18, 40\) .*got \(18,\)"),
}
# fmt: on
#: Errors that need the tensors' values: the fake has none.
DATA: dict[str, Change] = {
    "id-6-of-5": (
        "topk_ids",
        lambda t: t.masked_fill(t == t[0, 0], 6),
        ValueError,
        r"below .*experts, 5.*got 6",
    ),
    "map-to-5-of-5": (
        "expert_map",
        given(torch.arange(1, 6)),
        ValueError,
        r"local ids below 5, or to -1, got 5",
    ),
}


def cases(changes: dict[str, Change]) -> list[Any]:
    return [
        pytest.param(
            caller,
            case,
            id=f"{case}-{caller}",
        )
        for case in changes
        for caller in CALLERS
    ]


@pytest.fixture(autouse=True)
def quiet_fakes() -> Iterator[None]:
    """Torch logs a traceback of everything that raises inside a fake."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    logger.disabled = True
    yield
    logger.disabled = False


def arguments(case: str) -> tuple[list[Any], dict[str, Any]]:
    layer = make_layer(M=9, K=48, I=40, E=5, topk=2)
    name, change, _, _ = (CHANGES | DATA)[case]
    values: dict[str, Any] = dict(zip(NAMES, layer.args, strict=True)) | layer.options
    values[name] = change(values.get(name))
    return [values.pop(n) for n in NAMES], values


def error_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Exception:
    with pytest.raises(Exception) as caught:
        function(*args, **kwargs)
    error: Exception = caught.value
    return error


@pytest.mark.parametrize(("caller", "case"), cases(CHANGES))
def test_wrong_argument(caller: str, case: str) -> None:
    positional, options = arguments(case)
    _, _, kind, message = CHANGES[case]
    with pytest.raises(kind, match=message) as real:
        CALLERS[caller](*positional, **options)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake_arguments = tree_map_only(Tensor, mode.from_tensor, (positional, options))
        fake = error_of(CALLERS[caller], *fake_arguments[0], **fake_arguments[1])
    assert (type(fake), str(fake)) == (real.type, str(real.value))


@pytest.mark.parametrize(("caller", "case"), cases(DATA))
def test_wrong_value(caller: str, case: str) -> None:
    positional, options = arguments(case)
    _, _, kind, message = DATA[case]
    with pytest.raises(kind, match=message):
        CALLERS[caller](*positional, **options)


@pytest.mark.parametrize("caller", CALLERS)
def test_more_experts_per_token_than_experts(caller: str) -> None:
    layer = make_layer(E=3, topk=2)
    ids, weights = torch.zeros(9, 4, dtype=torch.int64), torch.rand(9, 4)
    with pytest.raises(ValueError, match=r"topk must be at most the number of experts, 3, got 4"):
        CALLERS[caller](*layer.args[:3], weights, ids)


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("name", ["hidden_states", "topk_ids"])
def test_no_tensor(name: str, caller: str) -> None:
    values: dict[str, Any] = dict(zip(NAMES, make_layer().args, strict=True)) | {name: [[0, 1]]}
    with pytest.raises(TypeError, match=rf"{name} must be a tensor.* got list"):
        CALLERS[caller](*values.values())


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("name", ["expert_map", *BIASES])
def test_no_tensor_nor_none(name: str, caller: str) -> None:
    layer = make_layer(M=9, K=48, I=40, E=5, topk=2)
    with pytest.raises(TypeError, match=f"{name} must be a tensor or None, got list"):
        CALLERS[caller](*layer.args, **{name: [0, 1]})


@pytest.mark.parametrize("caller", CALLERS)
def test_number_of_experts_that_is_no_number(caller: str) -> None:
    with pytest.raises(TypeError, match="global_num_experts must be an int, got str"):
        CALLERS[caller](*make_layer().args, global_num_experts="5")


@pytest.mark.parametrize("caller", ["triton-kernel", "torch-kernel"])
@pytest.mark.parametrize("name", ["w1_scale", "w2_scale", "w1_zp", "w2_zp", "a1_scale", "a2_scale"])
def test_scales_and_zero_points(name: str, caller: str) -> None:
    with pytest.raises(ValueError, match=rf"\w+ without a quant_config .* no {name}; pass None, or"):
        CALLERS[caller](*make_layer().args, **{name: torch.ones(1)})


@pytest.mark.parametrize(
    "make",
    [
        TritonExperts,
        TorchExperts,
        MoEPrepareAndFinalizeNoEP,
        lambda quant_config: compile_moe.fused_experts(*make_layer().args, quant_config=quant_config),
    ],
    ids=["triton", "torch", "no-ep", "function"],
)
def test_quant_config(make: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=r"quant_config must be a .*FusedMoEQuantConfig, or None .*got 'fp8'"):
        make(quant_config="fp8")


def odd_limit(limit: Any) -> Any:
    return pytest.param(
        {"name": "swigluoai", "limit": limit},
        r"limit must be .* got",
        id=f"limit-{limit!r}",
    )


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"name": "swish"}, r"activation must be one of silu, .* got 'swish'"),
        ({"name": "gelu", "alpha": 1.0}, r"'gelu' takes neither"),
        ({"name": "relu2_no_mul", "limit": 1.0}, r"'relu2_no_mul' takes neither"),
        ({"name": "silu_no_mul", "interleaved": True}, r"'silu_no_mul' has no up columns"),
        odd_limit(-1.0),
        odd_limit(float("nan")),
        odd_limit("7"),
    ],
)
def test_activation_parameters(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        Activation(**parameters)


@pytest.mark.parametrize("result", [None, 3.0, ()], ids=repr)
def test_activation_that_returns_no_tensor(result: Any) -> None:
    with pytest.raises(TypeError, match="activation must return a tensor"):
        compile_moe.fused_experts(*make_layer().args, activation=lambda gate_up: result)


class Preparing(MoEPrepareAndFinalizeNoEP):
    def __init__(self, prepared: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.prepared = prepared

    def prepare(self, a1: Tensor, *args: Any) -> Any:
        return self.prepared(a1)


@pytest.mark.parametrize(
    "prepared",
    [lambda a: None, lambda a: a, lambda a: (a, None), lambda a: (a, *[None] * 5)],
    ids=["nothing", "tensor", "2-tuple", "6-tuple"],
)
def test_prepare_that_returns_something_else(prepared: Callable[[Tensor], Any]) -> None:
    with pytest.raises(TypeError, match=r"prepare must return .*PrepareResult.*got"):
        FusedMoEModularKernel(Preparing(prepared), TritonExperts())(*make_layer().args)


def test_messages() -> None:
    """How they read: one of each class."""
    shown = ("x-3d", "K-of-w1", "mixed-w1", "fp8-x", "w1-elsewhere", "global-experts", "unknown-activation")
    messages = []
    for case in shown:
        positional, options = arguments(case)
        error = error_of(compile_moe.fused_experts, *positional, **options)
        messages.append(f"{type(error).__name__}: {error}")
    shown_text = "\n".join(textwrap.fill(m, 100) for m in messages)
    assert_expected_inline(
        shown_text,
        """\
ValueError: hidden_states must be (M, K), got (1, 9, 48); flatten the leading dimensions (the
batched format (E, max_num_tokens, K) is what prepare makes of tokens)
ValueError: hidden_states (M, K), w1 (E, N, K) and w2 (E, K, I) must agree in K, got (9, 48), (5,
80, 40) and (5, 48, 40)
TypeError: w1 must have the dtype of hidden_states, torch.float32, got torch.bfloat16; convert one
of them, or run under torch.autocast
TypeError: hidden_states must be one of torch.bfloat16, torch.float16, torch.float32, torch.float64
on cpu, got torch.float8_e5m2
ValueError: w1 must be on the device of hidden_states, cpu, got meta
ValueError: global_num_experts must be w1's number of experts, 5, where there is no expert_map, got
7; pass the map from global to local ids
ValueError: activation must be one of silu, gelu, gelu_tanh, relu2, swigluoai, silu_no_mul,
gelu_no_mul, gelu_tanh_no_mul, relu2_no_mul, an Activation or a callable, got 'swish'""",
    )
