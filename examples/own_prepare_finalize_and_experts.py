"""Your own prepare/finalize and experts in the modular kernel, alone and with the built-in parts."""

from typing import Any

import torch
from torch import Tensor

import compile_moe


class PaddedTokens(compile_moe.FusedMoEPrepareAndFinalize):
    """Pads the tokens to a multiple of 8; the ids of padding rows are -1, which every experts class skips."""

    def prepare(
        self,
        a1: Tensor,
        a1_scale: Tensor | None,
        a2_scale: Tensor | None,
        topk_weights: Tensor,
        topk_ids: Tensor,
        num_experts: int,
        expert_map: Tensor | None,
        apply_router_weight_on_input: bool,
    ) -> compile_moe.PrepareResult:
        if apply_router_weight_on_input:
            a1 = (a1 * topk_weights).to(a1.dtype)
        rows = -a1.size(0) % 8
        padded = torch.nn.functional.pad(a1, (0, 0, 0, rows))
        return compile_moe.PrepareResult(
            padded, topk_ids=torch.nn.functional.pad(topk_ids, (0, 0, 0, rows), value=-1)
        )

    def finalize(
        self,
        output: Tensor,
        fused_expert_output: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        apply_router_weight_on_input: bool,
    ) -> None:
        results = fused_expert_output[: output.size(0)].float()
        if not apply_router_weight_on_input:
            results = results * topk_weights.unsqueeze(-1)
        output.copy_(results.sum(1))


class DenseExperts(compile_moe.FusedMoEPermuteExpertsUnpermute):
    """Every expert over every slot, into the workspaces that the kernel provides: slow, but short."""

    def workspace_shapes(
        self, a: Tensor, M: int, N: int, K: int, topk: int, num_experts: int
    ) -> tuple[int, int, torch.dtype]:
        # M counts the tokens before prepare, which pads by at most 7.
        slots = (M + 7) * topk
        return slots * max(N, K), slots * N, a.dtype

    def apply(
        self,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_ids: Tensor,
        activation: Any,
        global_num_experts: int,
        expert_map: Tensor | None,
        w1_scale: Tensor | None,
        w2_scale: Tensor | None,
        w1_zp: Tensor | None,
        w2_zp: Tensor | None,
        a1q_scale: Tensor | None,
        a2_scale: Tensor | None,
        workspace13: Tensor,
        workspace2: Tensor,
        expert_num_tokens: Tensor | None,
    ) -> Tensor:
        assert expert_map is None, "this example is for one device"
        slots, N, K, I = topk_ids.numel(), w1.size(1), w2.size(1), w2.size(2)
        gate_up = workspace13[: slots * N].view(slots, N)
        intermediate = workspace2[: slots * I].view(slots, I)
        rows = hidden_states.repeat_interleave(topk_ids.size(1), 0)
        chosen = [(topk_ids.flatten() == e).unsqueeze(1) for e in range(w1.size(0))]
        for e, mask in enumerate(chosen):
            gate_up += (rows @ w1[e].t()) * mask
        self.activation(activation, intermediate, gate_up)
        # Both GEMMs share workspace13: by now nobody needs the first one's result.
        out = workspace13[: slots * K].view(slots, K).zero_()
        for e, mask in enumerate(chosen):
            out += (intermediate @ w2[e].t()) * mask
        return out.view(*topk_ids.shape, K)


@torch.no_grad()
def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    x = torch.randn(13, 32, device=device)
    w1 = torch.randn(4, 96, 32, device=device) * 32**-0.5
    w2 = torch.randn(4, 32, 48, device=device) * 48**-0.5
    weights, ids = torch.randn(13, 4, device=device).softmax(-1).topk(2)
    expected = compile_moe.fused_experts(x, w1, w2, weights, ids)
    for parts in (PaddedTokens(), compile_moe.MoEPrepareAndFinalizeNoEP()):
        for experts in (DenseExperts(), compile_moe.TritonExperts()):
            kernel = compile_moe.FusedMoEModularKernel(parts, experts)
            for how, function in (
                ("eager", kernel),
                ("compiled", torch.compile(kernel, fullgraph=True, backend="aot_eager")),
            ):
                result = function(x, w1, w2, weights, ids)
                torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3)
                print(f"{type(parts).__name__} with {type(experts).__name__}, {how}: equal to fused_experts")


if __name__ == "__main__":
    main()
