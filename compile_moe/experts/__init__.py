"""Experts: the two grouped GEMMs with the activation between them."""

from compile_moe.experts.batched import BatchedTorchExperts, BatchedTritonExperts
from compile_moe.experts.torch_experts import TorchExperts
from compile_moe.experts.triton_experts import TritonExperts

__all__ = ["BatchedTorchExperts", "BatchedTritonExperts", "TorchExperts", "TritonExperts"]
