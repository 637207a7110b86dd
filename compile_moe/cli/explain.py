"""``compile-moe explain``: the kernels of a compiled MoE layer, as a tree."""

from __future__ import annotations

import importlib.util
import io
import linecache
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group
from rich.text import Text
from rich.tree import Tree
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import compile_moe
from compile_moe.cli.language_model import choose_device, choose_dtype, one_line
from compile_moe.cli.moe_layer import (
    configuration,
    custom_configuration,
    experts_of,
    make_layer,
    set_activation,
)
from compile_moe.cli.refusal import Refusal

_WIDTH = 110
_STYLES = {"generated": "green", "op": "bold cyan", "call": "magenta"}


@dataclass(frozen=True)
class ExplainOptions:
    """What the command line gives; None leaves the choice to the command.

    sizes: hidden size, intermediate size, experts, topk, intermediate size of the shared expert (0: none).
    """

    model: str | None = None
    sizes: tuple[int, int, int, int, int] | None = None
    tokens: int = 16
    static: bool = False
    activation: str | None = None
    experts: str = "compile_moe"
    device: str | None = None
    dtype: str | None = None
    html: Path | None = None
    svg: Path | None = None


def own_shape(
    sizes: dict[str, int | None], model: str | None, shared_intermediate_size: int
) -> tuple[int, int, int, int, int] | None:
    """The sizes, by their options, if they were given; None where a model is to be taken.

    Raises:
        Refusal: some of them only, or sizes beside a model.
    """
    given = [option for option, size in sizes.items() if size is not None]
    if not given and not shared_intermediate_size:
        return None
    if model is not None:
        raise Refusal(f"--model or a shape of your own, not both; got {', '.join(given)} beside --model")
    hidden, intermediate, experts, topk = sizes.values()
    if hidden is None or intermediate is None or experts is None or topk is None:
        missing = ", ".join(option for option in sizes if option not in given)
        raise Refusal(f"a shape of your own needs {', '.join(sizes)}; {missing} is missing")
    return hidden, intermediate, experts, topk, shared_intermediate_size


def run_explain(options: ExplainOptions) -> None:
    """Print the tree to stdout, and write it to the files asked for.

    Raises:
        Refusal: options that can't work here.
    """
    if options.tokens < 1:
        raise Refusal(f"--tokens must be at least 1, got {options.tokens}")
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    activation = None if options.activation is None else _load_activation(options.activation)
    if options.sizes is not None:
        config, name = custom_configuration(*options.sizes), "own sizes"
    else:
        name = options.model or "qwen3-30b-a3b"
        config = configuration(name)
    explanation, described = _explain(config, activation, options, device, dtype)
    heading = Text(
        f"{name}: {described}\n{options.tokens} tokens, {dtype}, {device}, torch {torch.__version__}"
    )
    out = Console() if Console().is_terminal else Console(width=_WIDTH)
    picture = _picture(heading, explanation, device)
    out.print(picture)
    for path, render in (
        (options.html, lambda console: console.export_html()),
        (options.svg, lambda console: console.export_svg(title="compile-moe explain")),
    ):
        if path is not None:
            console = Console(record=True, file=io.StringIO(), width=_WIDTH)
            console.print(picture)
            _write(path, render(console))


def _explain(
    config: Any,
    activation: Callable[..., Any] | None,
    options: ExplainOptions,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Any, str]:
    """The explanation, and the layer in words. Tensors are fake: nothing is allocated."""
    with FakeTensorMode(shape_env=ShapeEnv()):
        layer = make_layer(config, options.experts, device, dtype)
        experts = experts_of(layer)
        if activation is not None:
            set_activation(layer, activation)
        hidden_states = torch.empty(options.tokens, config.hidden_size, device=device, dtype=dtype)
        if not options.static and options.tokens > 1:
            torch._dynamo.mark_dynamic(hidden_states, 0)
        try:
            explanation = compile_moe.explain(layer, hidden_states)
        except Exception as error:  # whatever a model, an activation or the compiler raises
            raise Refusal(
                f"this layer doesn't compile as one graph: {type(error).__name__}: {one_line(error)[:400]}"
            ) from error
    weights = ", ".join(f"{name} {tuple(p.shape)}" for name, p in experts.named_parameters() if p.dim() == 3)
    return explanation, f"{type(layer.moe).__name__}, experts {options.experts!r}, {weights}"


def _picture(heading: Text, explanation: Any, device: torch.device) -> Group:
    tree = Tree(heading)
    for kernel in explanation.kernels:
        label = Text(kernel.name or "generated kernel", style=_STYLES[kernel.kind])
        branch = tree.add(label)
        if kernel.kind == "generated":
            branch.add(Text(", ".join(kernel.operations) or "copy"))
        if kernel.epilogue:
            layout, *steps = kernel.epilogue.split("; ")
            epilogue = branch.add(Text(f"epilogue, over {layout} gate and up"))
            for step in steps:
                epilogue.add(Text(step))
    refused = tree.add(Text("not fused", style="bold yellow" if explanation.refusals else "dim"))
    for refusal in explanation.refusals or ("nothing that could be",):
        refused.add(Text(refusal))
    generated = sum(kernel.kind == "generated" for kernel in explanation.kernels)
    notes = [
        f"{generated} generated kernels, {len(explanation.kernels) - generated} calls. An op of ours is one kernel, "
        "but for the token sort: up to four with the router, by the number of tokens."
    ]
    if device.type != "cuda":
        notes.append(
            "These are the kernels for a CPU; on a GPU more is fused (run it with --device cuda there)."
        )
    return Group(tree, Text("\n".join(notes), style="dim"))


def _load_activation(given: str) -> Any:
    """The function that FILE.py:FUNCTION names, or the name of an activation as a function.

    Raises:
        Refusal: no such file or function, or the file doesn't run.
    """
    file, colon, function = given.rpartition(":")
    if not colon:
        raise Refusal(f"--activation must be FILE.py:FUNCTION, got {given}")
    name = f"compile_moe_activation_{Path(file).stem}"
    spec = importlib.util.spec_from_file_location(name, file) if Path(file).is_file() else None
    if spec is None or spec.loader is None:
        raise Refusal(f"--activation must name a Python file, but {file} is none")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dynamo looks for a function's globals
    linecache.checkcache(file)  # what it quotes, if the file was edited since
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises
        raise Refusal(f"--activation: {file} raised {type(error).__name__}: {one_line(error)}") from error
    activation = getattr(module, function, None)
    if not callable(activation):
        raise Refusal(f"--activation: {file} has no function {function}")
    return activation


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise Refusal(f"{path} can't be written: {error.strerror}") from error
