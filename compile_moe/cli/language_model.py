"""The demo's language model: its device and dtype, its weights, its prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import compile_moe.integrations.transformers as integration
from compile_moe.cli.refusal import Refusal

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


class LanguageModel(NamedTuple):
    """A causal language model of transformers, and its tokenizer if it has one."""

    model: Any
    tokenizer: Any
    name: str


class Block(NamedTuple):
    """The first MoE block of a model: the module that holds the experts."""

    name: str
    module: nn.Module


def choose_device(name: str | None) -> torch.device:
    """The device called ``name``; None: the GPU where there is one."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise Refusal(f"--device must be cpu, cuda or cuda:N, got {name}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise Refusal(
                f"--device {name}, but torch {torch.__version__} sees no CUDA device here; use --device cpu"
            )
        if (device.index or 0) >= torch.cuda.device_count():
            raise Refusal(
                f"--device {name}, but there are {torch.cuda.device_count()} CUDA devices, counted from 0"
            )
    return device


def choose_dtype(name: str | None, device: torch.device) -> torch.dtype:
    if name is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in DTYPES:
        raise Refusal(f"--dtype must be {', '.join(DTYPES)}, got {name}")
    return DTYPES[name]


def load(
    folder: Path | None, experts: str, device: torch.device, dtype: torch.dtype, seed: int
) -> LanguageModel:
    """The checkpoint in ``folder``, or a small random model.

    Raises:
        Refusal: no transformers, no such folder, no model in it that transformers loads, no such experts.
    """
    try:
        integration.register()
    except ImportError as error:
        raise Refusal(one_line(error)) from error
    import transformers

    transformers.utils.logging.set_verbosity_error()
    if folder is None:
        torch.manual_seed(seed)
        auto = transformers.AutoModelForCausalLM
        model = _make(lambda: auto.from_config(small_config(), dtype=dtype, experts_implementation=experts))
        return LanguageModel(model.eval().to(device), None, f"small Qwen3-MoE, random weights, seed {seed}")
    if not folder.is_dir():
        raise Refusal(f"--model must be a folder with a checkpoint, but {folder} is no folder")
    if not (folder / "config.json").is_file():
        raise Refusal(f"--model must be a folder with a checkpoint, but {folder} holds no config.json")
    # Without the last option transformers asks whether to run code that comes with a checkpoint.
    local = {"local_files_only": True, "trust_remote_code": False}
    model, loading = _make(
        lambda: transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, experts_implementation=experts, output_loading_info=True, **local
        )
    )
    if missing := loading["missing_keys"]:
        raise Refusal(
            f"--model must hold all weights, but {folder} lacks {len(missing)}, such as {min(missing)}"
        )
    tokenizer = None
    if any((folder / file).is_file() for file in _TOKENIZER_FILES):
        tokenizer = _make(lambda: transformers.AutoTokenizer.from_pretrained(folder, **local))
    return LanguageModel(model.eval().to(device), tokenizer, folder.resolve().name)


def small_config() -> Any:
    """A Qwen3-MoE that two CPU cores compile and run within two minutes."""
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        max_position_embeddings=2048,
    )


def encode(language_model: LanguageModel, prompt: str, max_new_tokens: int) -> Tensor:
    """The prompt's token ids, (1, S) int64; without a tokenizer, the bytes of its UTF-8."""
    model, tokenizer, _ = language_model
    config = model.config.get_text_config()
    ids = tokenizer(prompt)["input_ids"] if tokenizer else [b % config.vocab_size for b in prompt.encode()]
    if not ids:
        raise Refusal("--prompt must hold at least one token, got an empty one")
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and len(ids) + max_new_tokens > limit:
        raise Refusal(
            f"--prompt of {len(ids)} tokens and --max-new-tokens {max_new_tokens} exceed the model's {limit} positions"
        )
    return torch.tensor([ids], device=model.device)


def moe_block(model: nn.Module) -> Block:
    """The first module that holds experts which transformers dispatches.

    Raises:
        Refusal: there is none, so that experts_implementation changes nothing in this model.
    """
    for name, module in model.named_modules():
        if hasattr(module, "has_gate") and hasattr(module, "is_transposed"):
            parent = name.rpartition(".")[0]
            return Block(parent, model.get_submodule(parent))
    raise Refusal(
        f"{type(model).__name__} holds no experts that transformers dispatches by experts_implementation; "
        "give a Mixture-of-Experts model"
    )


def _make(build: Any) -> Any:
    try:
        return build()
    except Exception as error:
        # Anything: unknown experts, a damaged file, a checkpoint that doesn't fit its config.
        raise Refusal(
            f"transformers can't load this model: {type(error).__name__}: {one_line(error)}"
        ) from error


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())
