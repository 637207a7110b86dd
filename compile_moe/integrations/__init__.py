"""Adapters to other libraries, which are imported at the first use only."""

from compile_moe.integrations import transformers

__all__ = ["transformers"]
