"""Imports go one way: API → ops → ops.kernels and quantization, lowering → ops and quantization, and only the
package's root reaches lowering.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "compile_moe"
INDUCTOR_FILE = f"{PACKAGE}.lowering.inductor_compat"

# What the modules of each layer may import of this package; a module belongs to the longest prefix that fits.
ALLOWED = {
    PACKAGE: ("api", "ops", "quantization"),
    f"{PACKAGE}.ops": ("ops", "kernels", "quantization"),
    f"{PACKAGE}.ops.kernels": ("kernels",),
    f"{PACKAGE}.quantization": ("quantization",),
    f"{PACKAGE}.lowering": ("lowering", "ops", "quantization"),
}
LAYERS = {
    PACKAGE: "api",
    f"{PACKAGE}.ops": "ops",
    f"{PACKAGE}.ops.kernels": "kernels",
    f"{PACKAGE}.quantization": "quantization",
    f"{PACKAGE}.lowering": "lowering",
}


def modules(root: Path) -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of whatever a module imports or reaches as an attribute of torch."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield node.lineno, argument.value
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch._inductor":
            yield node.lineno, "torch._inductor"


def layer(name: str) -> str:
    prefix = max((p for p in LAYERS if is_within(name, p)), key=len)
    return LAYERS[prefix]


def is_within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def violations(name: str, path: Path) -> list[str]:
    found = []
    prefix = max((p for p in ALLOWED if is_within(name, p)), key=len)
    for line, imported in imports(name, path):
        if is_within(imported, "torch._inductor") and name != INDUCTOR_FILE:
            found.append(f"{path.name}:{line} reaches {imported}; only {INDUCTOR_FILE} may")
        if not is_within(imported, PACKAGE) or layer(imported) in ALLOWED[prefix]:
            continue
        if name == PACKAGE and layer(imported) == "lowering":
            continue
        found.append(f"{path.name}:{line} {name} ({LAYERS[prefix]}) imports {imported} ({layer(imported)})")
    return found


@pytest.mark.parametrize(
    ("name", "path"), modules(ROOT).items(), ids=lambda v: v if isinstance(v, str) else ""
)
def test_imports_go_one_way(name: str, path: Path) -> None:
    assert violations(name, path) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("ops/kernels/gemm.py", "from compile_moe.ops.registry import define_op"),
        ("ops/kernels/gemm.py", "from ..registry import define_op"),
        ("ops/gemm.py", "from compile_moe import activations"),
        ("ops/gemm.py", "import compile_moe.lowering"),
        ("ops/gemm.py", "def f():\n    from ..lowering import register"),
        ("ops/__init__.py", "from .. import activations"),
        ("quantization/schemes/fp8.py", "from compile_moe.ops.problem_size import require"),
        ("quantization/scheme.py", "from compile_moe import quant_config"),
        ("ops/kernels/gemm.py", "from compile_moe.quantization import Scheme"),
        ("lowering/gemm.py", "from compile_moe.activations import Activation"),
        ("lowering/gemm.py", "from compile_moe.ops.kernels import gemm"),
        ("lowering/gemm.py", "from torch._inductor import ir"),
        ("lowering/gemm.py", "import torch\nx = torch._inductor.config"),
        ("experts/triton.py", "from compile_moe.ops.kernels.gemm import launch"),
        ("fused_experts.py", "import importlib\nimportlib.import_module('compile_moe.lowering')"),
    ],
    ids=lambda text: text.splitlines()[-1].strip().replace(" ", "_"),
)
def test_forbidden_import_is_found(tmp_path: Path, file: str, line: str) -> None:
    path = tmp_path / PACKAGE / file
    path.parent.mkdir(parents=True)
    path.write_text(line)
    ((name, _),) = modules(tmp_path).items()
    assert len(set(violations(name, path))) == 1


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("__init__.py", "from compile_moe.lowering import register"),
        ("ops/gemm.py", "from compile_moe.ops.kernels.gemm import launch"),
        ("lowering/inductor_compat.py", "from torch._inductor import ir"),
        ("lowering/gemm.py", "from . import inductor_compat\nfrom ..ops.gemm import outputs"),
        ("experts/triton.py", "from compile_moe.ops import gather_gemm"),
        ("ops/gemm.py", "from compile_moe.quantization import parse_scheme"),
        ("quant_config.py", "from compile_moe.quantization import make_scheme"),
    ],
    ids=lambda text: text.splitlines()[-1].strip().replace(" ", "_"),
)
def test_allowed_import_is_not(tmp_path: Path, file: str, line: str) -> None:
    path = tmp_path / PACKAGE / file
    path.parent.mkdir(parents=True)
    path.write_text(line)
    ((name, _),) = modules(tmp_path).items()
    assert violations(name, path) == []


def test_import_does_not_load_inductor() -> None:
    """Nor what else takes half a second and more, and only compilation needs."""
    slow = ("torch._inductor", "torch._dynamo", "torch.fx.experimental.symbolic_shapes", "sympy")
    code = f"import sys, {PACKAGE}; print(*(m for m in sys.modules if m.startswith({slow})))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []
