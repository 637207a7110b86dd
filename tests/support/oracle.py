"""The float64 oracle of the layer, the tolerance rule, and the list of layers that tests share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Function = Callable[[Tensor], Tensor]


def _gated(f: Function) -> Function:
    def apply(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return f(gate) * up

    return apply


def swigluoai(gate_up: Tensor, alpha: float = 1.702, limit: float = 7.0) -> Tensor:
    gate, up = gate_up[..., ::2].clamp(max=limit), gate_up[..., 1::2].clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


_PLAIN: dict[str, Function] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
}
#: Every named activation as a function of gate_up, written with torch's own functions.
ACTIVATIONS: dict[str, Function] = {
    **{name: _gated(f) for name, f in _PLAIN.items()},
    **{f"{name}_no_mul": f for name, f in _PLAIN.items()},
    "swigluoai": swigluoai,
}


@dataclass
class Layer:
    """Arguments of ``fused_experts``, with the activation's function for the oracle."""

    hidden_states: Tensor
    w1: Tensor
    w2: Tensor
    topk_weights: Tensor
    topk_ids: Tensor
    activation: Any = "silu"
    function: Function = ACTIVATIONS["silu"]
    expert_map: Tensor | None = None
    w1_bias: Tensor | None = None
    w2_bias: Tensor | None = None
    apply_router_weight_on_input: bool = False

    @property
    def args(self) -> tuple[Tensor, ...]:
        return self.hidden_states, self.w1, self.w2, self.topk_weights, self.topk_ids

    @property
    def options(self) -> dict[str, Any]:
        return {
            "activation": self.activation,
            "expert_map": self.expert_map,
            "w1_bias": self.w1_bias,
            "w2_bias": self.w2_bias,
            "apply_router_weight_on_input": self.apply_router_weight_on_input,
        }

    def to(self, dtype: torch.dtype) -> Layer:
        """The same layer computed in another dtype; ids and maps stay."""

        def cast(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(dtype)

        return replace(
            self,
            hidden_states=self.hidden_states.to(dtype),
            w1=self.w1.to(dtype),
            w2=self.w2.to(dtype),
            w1_bias=cast(self.w1_bias),
            w2_bias=cast(self.w2_bias),
        )

    def reference(self, absolute: bool = False) -> Tensor:
        """The layer's result in plain PyTorch, a mask and two dense GEMMs an expert, in the layer's own dtype.

        absolute: the sum of the experts' absolute values instead.

        Called on a float64 copy it is the oracle; on the layer itself, the low-precision computation whose error
        bounds ours. Shares no code with the library.
        """
        x, dtype = self.hidden_states, self.hidden_states.dtype
        weights = self.topk_weights.to(torch.float64 if dtype is torch.float64 else torch.float32)
        ids = self.topk_ids.long()
        if self.expert_map is not None:
            table = torch.cat([self.expert_map.long(), self.expert_map.new_full((1,), -1).long()])
            ids = table[torch.where((ids < 0) | (ids >= len(self.expert_map)), len(self.expert_map), ids)]
        if self.apply_router_weight_on_input:
            x = (x * self.topk_weights).to(dtype)
        out = torch.zeros(x.size(0), self.w2.size(1), dtype=weights.dtype, device=x.device)
        for e in range(self.w1.size(0)):
            token, j = torch.where(ids == e)
            gate_up = x[token] @ self.w1[e].t()
            if self.w1_bias is not None:
                gate_up = gate_up + self.w1_bias[e]
            y = self.function(gate_up) @ self.w2[e].t()
            if self.w2_bias is not None:
                y = y + self.w2_bias[e]
            y = y.to(weights.dtype)
            if not self.apply_router_weight_on_input:
                y = y * weights[token, j, None]
            out.index_put_((token,), y.abs() if absolute else y, accumulate=True)
        return out.to(dtype)


def noise(exact: Tensor, dtype: torch.dtype) -> float:
    """What norms of the error of so few elements may differ by, from one draw to the next.

    Zeros don't count: a token whose experts have no room for it adds no error either. In float32 most of the error is
    that of an order of sums, and nine tokens, as most tests have, had 2.2 times another order's once in 150 draws (on
    a CPU, torch 2.13).
    """
    num_elements = int(exact.count_nonzero())
    if num_elements < 256:
        return 2.0
    return 1.5 if dtype is torch.float32 and num_elements < 512 else 1.0


def assert_as_accurate(result: Tensor, layer: Layer, factor: float = 2.0) -> None:
    """The tolerance rule: against float64, at most ``factor`` times the error of plain PyTorch at that precision.

    In the Frobenius norm, plus ``factor`` roundings of the largest element, as large as its summands are: plain PyTorch
    can be exact by luck. ``factor`` is larger where few elements make norms noisy (:func:`noise`).
    """
    float64 = layer.to(torch.float64)
    exact = float64.reference()
    assert result.shape == exact.shape and result.device == layer.hidden_states.device
    assert result.dtype is layer.hidden_states.dtype
    assert torch.isfinite(result).all(), "not finite"
    if not result.numel():
        return
    factor *= noise(exact, result.dtype)
    error = (result.double() - exact).norm().item()
    plain = (layer.reference().double() - exact).norm().item()
    summands = float64.reference(absolute=True) if isinstance(float64, Layer) else exact.abs()
    rounding = torch.finfo(result.dtype).eps * summands.max().item()
    bound = factor * (plain + rounding)
    assert error <= bound, f"error {error:.3e} exceeds {factor} x plain PyTorch's: {bound:.3e}"


def make_layer(
    M: int = 9,
    K: int = 48,
    I: int = 40,
    E: int = 5,
    topk: int = 2,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    activation: Any = "silu",
    function: Function | None = None,
    routing: str = "random",
    transposed: bool = False,
    biased: bool = False,
    mapped: bool = False,
    skipped: bool = False,
    strided: bool = False,
    ids_dtype: torch.dtype = torch.int64,
    weights_dtype: torch.dtype = torch.float32,
    apply_router_weight_on_input: bool = False,
) -> Layer:
    """A random layer.

    Args:
        routing: "random", "one" (every token to expert 1), "empty" (nobody to expert 0 and the last), or
            "duplicate" (a token's experts repeat).
        transposed: w1 and w2 are views of (E, K, N) and (E, I, K) storage.
        mapped: an expert_map over twice E global experts, half of them elsewhere.
        skipped: some ids negative, some equal to the number of global experts.
        strided: hidden_states, topk_weights and topk_ids are non-contiguous views.
    """
    if function is None:
        function = ACTIVATIONS[activation]
    ungated = isinstance(activation, str) and activation.endswith("_no_mul")
    n = I if ungated else 2 * I

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, device=device) * scale).to(dtype)

    def weights(e: int, rows: int, columns: int) -> Tensor:
        if transposed:
            return randn(e, columns, rows, scale=columns**-0.5).transpose(1, 2)
        return randn(e, rows, columns, scale=columns**-0.5)

    num_global = 2 * E if mapped else E
    scores = torch.rand(M, num_global, device=device)
    if routing == "one":
        ids = torch.ones(M, topk, dtype=torch.int64, device=device)
    elif routing == "duplicate":
        ids = scores.argmax(-1, keepdim=True).expand(M, topk).contiguous()
    else:
        if routing == "empty":
            scores[:, 0] = scores[:, -1] = -1
        ids = scores.topk(topk).indices
    expert_map = None
    if mapped:
        expert_map = torch.full((num_global,), -1, dtype=ids_dtype, device=device)
        expert_map[torch.randperm(num_global, device=device)[:E]] = torch.arange(
            E, device=device, dtype=ids_dtype
        )
    if skipped and M:
        flat = ids.view(-1)
        flat[::3] = -1
        flat[1::5] = num_global
    x = randn(M, K)
    topk_weights = torch.rand(M, topk, device=device).to(weights_dtype)
    ids = ids.to(ids_dtype)
    if strided:
        x = torch.stack([randn(M, K), x], 1)[:, 1]
        topk_weights = torch.stack([topk_weights, topk_weights + 1], -1)[..., 0]
        ids = ids.t().contiguous().t()
    return Layer(
        x,
        weights(E, n, K),
        weights(E, K, I),
        topk_weights,
        ids,
        activation,
        function,
        expert_map,
        randn(E, n) if biased else None,
        randn(E, K) if biased else None,
        apply_router_weight_on_input,
    )


#: Hostile layers, by readable name: arguments of :func:`make_layer`.
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "M0": {"M": 0},
    "M1": {"M": 1},
    "M1-topk1-on-input": {"M": 1, "topk": 1, "apply_router_weight_on_input": True},
    "topk1-on-input": {"topk": 1, "apply_router_weight_on_input": True},
    "odd": {"M": 63, "K": 37, "I": 19, "E": 7, "topk": 3},
    "tiny": {"M": 3, "K": 1, "I": 1, "E": 2, "topk": 2},
    "one-expert": {"E": 1, "topk": 1},
    "all-on-one": {"M": 40, "routing": "one"},
    "empty-experts": {"M": 20, "routing": "empty"},
    "duplicates": {"topk": 3, "routing": "duplicate"},
    "transposed": {"transposed": True},
    "biased": {"biased": True},
    "transposed-biased-swigluoai": {"transposed": True, "biased": True, "activation": "swigluoai"},
    "mapped": {"M": 17, "mapped": True},
    "mapped-int32-biased": {"M": 17, "mapped": True, "biased": True, "ids_dtype": torch.int32},
    "skipped": {"M": 17, "topk": 3, "skipped": True},
    "skipped-mapped": {"M": 17, "topk": 3, "skipped": True, "mapped": True},
    "strided": {"strided": True, "ids_dtype": torch.int32},
    "ungated": {"activation": "relu2_no_mul"},
    "weights-in-hidden-dtype": {"weights_dtype": torch.bfloat16},
    "many-experts": {"M": 30, "E": 70, "topk": 8, "K": 16, "I": 16},
}
