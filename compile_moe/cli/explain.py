"""``compile-moe explain``: the kernels of a compiled MoE layer, as a tree."""

from __future__ import annotations

import functools
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
from compile_moe.activations import call_activation
from compile_moe.cli.language_model import choose_device, choose_dtype, one_line
from compile_moe.cli.moe_layer import (
    columns_of,
    configuration,
    custom_configuration,
    experts_of,
    make_layer,
    set_activation,
)
from compile_moe.cli.refusal import Refusal
from compile_moe.ops.epilogue import evaluate_steps, parse
from compile_moe.ops.named_activations import NAMES, program_text

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
    given += ["--shared-intermediate-size"] if shared_intermediate_size else []
    if not given:
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
    tokens = f"{options.tokens} token{'s' if options.tokens > 1 else ''}"
    heading = Text(f"{name}: {described}\n{tokens}, {dtype}, {device}, torch {torch.__version__}")
    compiled_for = "any number of tokens" if _is_dynamic(options) else f"{tokens} only"
    picture = _picture(heading, explanation, compiled_for, device)
    for path, render in (
        (options.html, lambda console: console.export_html()),
        (options.svg, lambda console: console.export_svg(title="compile-moe explain")),
    ):
        if path is not None:
            console = Console(record=True, file=io.StringIO(), width=_WIDTH)
            console.print(picture)
            _write(path, render(console))
    out = Console() if Console().is_terminal else Console(width=_WIDTH)
    out.print(picture)


def _is_dynamic(options: ExplainOptions) -> bool:
    # torch.compile makes a size of 1 static, or refuses.
    return not options.static and options.tokens > 1


def _explain(
    config: Any,
    activation: Callable[..., Any] | None,
    options: ExplainOptions,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Any, str]:
    """The explanation, and the layer in words. Tensors are fake: nothing is allocated."""
    fake = FakeTensorMode(shape_env=ShapeEnv())
    with fake:
        layer = make_layer(config, options.experts, device, dtype)
    experts = experts_of(layer)
    if activation is not None:
        _try_activation(activation, *columns_of(experts), device, dtype)
        set_activation(layer, activation)
    with fake:
        hidden_states = torch.empty(options.tokens, config.hidden_size, device=device, dtype=dtype)
        if _is_dynamic(options):
            torch._dynamo.mark_dynamic(hidden_states, 0)
        try:
            explanation = compile_moe.explain(layer, hidden_states)
        except NotImplementedError as error:  # of another inductor
            raise Refusal(one_line(error)) from error
        except Exception as error:  # whatever a model, an activation or the compiler raises
            raise Refusal(
                f"this layer doesn't compile as one graph: {type(error).__name__}: {one_line(error)[:400]}"
            ) from error
    weights = ", ".join(f"{name} {tuple(p.shape)}" for name, p in experts.named_parameters() if p.dim() == 3)
    return explanation, f"{type(layer.moe).__name__}, experts {options.experts!r}, {weights}"


def _try_activation(
    activation: Callable[..., Any],
    num_columns: int,
    intermediate_size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Call it on two real rows: dynamo would bury what it raises.

    Raises:
        Refusal: it raises, or returns anything but (..., I).
    """
    rows = torch.zeros(2, num_columns, device=device, dtype=dtype)
    try:
        with torch.no_grad():
            call_activation(activation, rows, intermediate_size)
    except Exception as error:  # whatever the user's function raises
        raise Refusal(f"--activation: {type(error).__name__}: {one_line(error)}") from error


def _picture(heading: Text, explanation: Any, compiled_for: str, device: torch.device) -> Group:
    tree = Tree(heading)
    for kernel in explanation.kernels:
        label = Text(kernel.name or "generated kernel", style=_STYLES[kernel.kind])
        branch = tree.add(label)
        if kernel.kind == "generated":
            branch.add(Text(", ".join(kernel.operations) or "copy"))
        if kernel.epilogue:
            layout, *steps = kernel.epilogue.split("; ")
            columns = "gate alone" if layout == "ungated" else f"{layout} gate and up"
            epilogue = branch.add(Text(f"epilogue, over {columns}"))
            for step in steps:
                epilogue.add(Text(step))
    refused = tree.add(Text("not fused", style="bold yellow" if explanation.refusals else "dim"))
    for refusal in explanation.refusals or ("nothing that could be",):
        refused.add(Text(refusal))
    notes = [
        f"{_counts(explanation.kernels)}. Compiled for {compiled_for}. An op of ours is one kernel; "
        "the token sort up to four with the router, by the number of tokens, a GEMM of many rows two, and the experts "
        "of one token two or three."
    ]
    if device.type != "cuda":
        notes.append(
            "These are the kernels for a CPU; on a GPU more is fused (run it with --device cuda there)."
        )
    return Group(tree, Text("\n".join(notes), style="dim"))


def _counts(kernels: tuple[Any, ...]) -> str:
    generated = sum(kernel.kind == "generated" for kernel in kernels)
    counts = f"{generated} generated kernels, {len(kernels) - generated} calls"
    behind = next((kernels[i + 1 :] for i, kernel in enumerate(kernels) if kernel.is_router_gemm), None)
    return counts if behind is None else f"{counts}; {len(behind)} of them after the router's GEMM"


def _load_activation(given: str) -> Callable[..., Any]:
    """The function that FILE.py:FUNCTION names, or a named activation as a function.

    Raises:
        Refusal: no such file, function or name, or the file doesn't run.
    """
    if given in NAMES:
        # A function, which other implementations of experts take as well as ours.
        return functools.partial(evaluate_steps, *parse(program_text(given)).as_tuples())
    file, _, function = given.rpartition(":")
    if not (file and function):
        raise Refusal(f"--activation must be FILE.py:FUNCTION or one of {', '.join(NAMES)}, got {given}")
    name = f"compile_moe_activation_{Path(file).stem}"
    spec = importlib.util.spec_from_file_location(name, file) if Path(file).is_file() else None
    if spec is None or spec.loader is None:
        raise Refusal(f"--activation must name a Python file, but {file} is none")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dynamo looks for a function's globals
    linecache.checkcache(file)  # what it quotes, if the file was edited since
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's file raises
        raise Refusal(
            f"--activation: {file} raised {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    activation: Callable[..., Any] | None = getattr(module, function, None)
    if not callable(activation):
        raise Refusal(f"--activation: {file} has no function {function}")
    return activation


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise Refusal(f"{path} can't be written: {error.strerror}") from error
