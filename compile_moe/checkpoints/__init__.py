"""Checkpoint formats of other tools, repacked into the layouts of the schemes. No values are rounded anew."""

from compile_moe.checkpoints.awq import repack_awq
from compile_moe.checkpoints.compressed_tensors import repack_compressed_tensors
from compile_moe.checkpoints.gptq import repack_gptq

__all__ = ["repack_awq", "repack_compressed_tensors", "repack_gptq"]
