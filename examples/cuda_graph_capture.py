"""Capture the layer in a CUDA graph by hand and replay it with new tokens and new routing."""

import torch

import compile_moe

HIDDEN, INTERMEDIATE, NUM_EXPERTS, TOPK, NUM_TOKENS = 256, 512, 8, 2, 16


@torch.no_grad()
def main() -> None:
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing to capture")
        return
    torch.manual_seed(0)
    options = {"device": "cuda", "dtype": torch.bfloat16}
    w1 = torch.randn(NUM_EXPERTS, 2 * INTERMEDIATE, HIDDEN, **options) * HIDDEN**-0.5
    w2 = torch.randn(NUM_EXPERTS, HIDDEN, INTERMEDIATE, **options) * INTERMEDIATE**-0.5

    # The graph reads these buffers at every replay.
    x = torch.zeros(NUM_TOKENS, HIDDEN, **options)
    topk_weights = torch.zeros(NUM_TOKENS, TOPK, device="cuda")
    topk_ids = torch.zeros(NUM_TOKENS, TOPK, dtype=torch.int64, device="cuda")

    # Nothing may be compiled or loaded inside a capture.
    compile_moe.warm_up(w1, w2, TOPK)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = compile_moe.fused_experts(x, w1, w2, topk_weights, topk_ids)

    for replay in range(3):
        x.normal_()
        weights, ids = torch.randn(NUM_TOKENS, NUM_EXPERTS, device="cuda").softmax(-1).topk(TOPK)
        topk_weights.copy_(weights)
        topk_ids.copy_(ids)
        graph.replay()
        equal = torch.equal(out, compile_moe.fused_experts(x, w1, w2, topk_weights, topk_ids))
        print(f"replay {replay}: {'equal to' if equal else 'DIFFERENT from'} the eager result")
        assert equal


if __name__ == "__main__":
    main()
