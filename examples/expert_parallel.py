"""A layer whose experts lie on several ranks; each rank has tokens of its own.

torchrun --nproc-per-node=2 examples/expert_parallel.py
"""

import os

import torch
import torch.distributed as dist

import compile_moe
from compile_moe import (
    AllGatherPrepareAndFinalize,
    AllToAllPrepareAndFinalize,
    BatchedAllToAllPrepareAndFinalize,
    BatchedTritonExperts,
    ExpertPlacement,
    TritonExperts,
)

HIDDEN, INTERMEDIATE, NUM_EXPERTS, TOPK = 128, 256, 8, 2
NUM_TOKENS, MORE = 5, 3  # of rank 0, and on each rank behind it


def own_tokens(rank: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Hidden states, router weights and expert ids of a rank: more tokens on later ranks."""
    generator = torch.Generator().manual_seed(rank)
    num_tokens = NUM_TOKENS + MORE * rank
    x = torch.randn(num_tokens, HIDDEN, generator=generator)
    weights, ids = torch.randn(num_tokens, NUM_EXPERTS, generator=generator).softmax(-1).topk(TOPK)
    return x.to(device), weights.to(device), ids.to(device)


@torch.no_grad()
def main() -> None:
    if not dist.is_torchelastic_launched():
        print("start me by: torchrun --nproc-per-node=2 examples/expert_parallel.py")
        return
    on_gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    dist.init_process_group("nccl" if on_gpus else "gloo")
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)

    torch.manual_seed(0)  # the same weights on all ranks, of which each keeps its own
    w1 = torch.randn(NUM_EXPERTS, 2 * INTERMEDIATE, HIDDEN).to(device) * HIDDEN**-0.5
    w2 = torch.randn(NUM_EXPERTS, HIDDEN, INTERMEDIATE).to(device) * INTERMEDIATE**-0.5
    placement = ExpertPlacement.linear(NUM_EXPERTS, num_ranks)
    local = list(placement.local_experts[rank])
    x, weights, ids = own_tokens(rank, device)
    expected = compile_moe.fused_experts(x, w1, w2, weights, ids)

    # An expert has room for all tokens of a rank: nothing is dropped.
    batched = BatchedAllToAllPrepareAndFinalize(placement, NUM_TOKENS + MORE * num_ranks, device=device)
    for parts, experts in (
        (AllToAllPrepareAndFinalize(placement, device=device), TritonExperts()),
        (AllGatherPrepareAndFinalize(placement, device=device), TritonExperts()),
        (batched, BatchedTritonExperts(batched.max_num_tokens)),
    ):
        layer = compile_moe.FusedMoEModularKernel(parts, experts)
        for kind, function in (("eager", layer), ("compiled", torch.compile(layer, fullgraph=True))):
            result = function(x, w1[local], w2[local], weights, ids, expert_map=parts.expert_map)
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
            if rank == 0:
                print(f"{type(parts).__name__} on {num_ranks} ranks ({device.type}), {kind}: as on one rank")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
