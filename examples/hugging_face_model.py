"""A Hugging Face MoE model on the library's experts: the same logits, one graph, and generate().

A checkpoint takes them in the same way, by ``from_pretrained(folder, experts_implementation="compile_moe")``.
"""

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import compile_moe.integrations.transformers as integration


def small_model(experts: str) -> torch.nn.Module:
    """A Qwen3-MoE with random weights, the same ones each time."""
    config = Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, experts_implementation=experts).eval()


def difference(logits: Tensor, expected: Tensor) -> str:
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)
    return f"logits differ by at most {(logits - expected).abs().max().item():.1e}"


@torch.no_grad()
def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    integration.register()
    theirs, ours = (small_model(experts).to(device) for experts in ("eager", "compile_moe"))
    prompt = torch.randint(256, (1, 24), device=device)
    expected = theirs(prompt).logits
    print(f"eager: {difference(ours(prompt).logits, expected)}")
    compiled = torch.compile(ours, fullgraph=True)
    print(f"compiled as one graph: {difference(compiled(prompt).logits, expected)}")

    greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    # With a static cache, transformers compiles the decoding of single tokens by itself on a GPU.
    tokens = ours.generate(prompt, **greedy, cache_implementation="static")
    assert torch.equal(tokens, theirs.generate(prompt, **greedy))
    print(f"generate(): {tokens.size(1) - prompt.size(1)} tokens, those that transformers' experts give")


if __name__ == "__main__":
    main()
