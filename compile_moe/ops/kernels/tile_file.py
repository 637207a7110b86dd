"""Files of tuned tiles: one JSON file for each device, shape of experts and set of versions."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch
import triton

from compile_moe.ops.kernels.gemm_problem import GemmProblem, Shape
from compile_moe.ops.kernels.tile_space import why_not
from compile_moe.ops.kernels.tiles import DeviceLimits, Tile

VARIABLE = "COMPILE_MOE_TILES"
#: The tile of each GEMM and number of slots.
TunedTiles = dict[GemmProblem, dict[int, Tile]]

Record = TypeVar("Record", GemmProblem, Tile)


def tiles_folder() -> Path | None:
    """Where files of tuned tiles are; None: nowhere, by the user's wish or for want of a home directory."""
    given = os.environ.get(VARIABLE)
    if given is not None:
        return Path(given) if given else None
    # Not with the module: importing compile_moe on a machine that launches nothing needs no folder.
    import platformdirs

    try:
        return platformdirs.user_cache_path("compile_moe") / "tiles"
    except RuntimeError:
        return None


@functools.cache
def versions() -> dict[str, str]:
    """What a tile was tuned for, beside device and shape."""
    folder, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return {
        "compile_moe's kernels": digest.hexdigest()[:16],
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def file_name(device: str, shape: Shape) -> str:
    """Of the file for these versions; those for others differ in what is behind the last hyphen."""
    digest = hashlib.sha256(json.dumps(versions()).encode()).hexdigest()[:8]
    sizes = f"E{shape.num_experts}-K{shape.hidden_size}-I{shape.intermediate_size}"
    return f"{re.sub(r'[^A-Za-z0-9]+', '_', device)}-{sizes}-{digest}.json"


def as_text(device: str, tuned: TunedTiles) -> str:
    gemms = [
        {
            "problem": problem._asdict(),
            "tiles": [{"slots": slots, "tile": tile._asdict()} for slots, tile in sorted(tiles.items())],
        }
        for problem, tiles in sorted(tuned.items())
    ]
    return json.dumps({"device": device, "versions": versions(), "gemms": gemms}, indent=1) + "\n"


def parse(text: str, device: str, shape: Shape, limits: DeviceLimits) -> TunedTiles:
    """What :func:`as_text` wrote.

    Raises:
        ValueError: anything else, another device, shape or versions, or tiles that can't run on this device.
    """
    try:
        given = _dictionary(json.loads(text), ("device", "versions", "gemms"), "the file")
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    for what, expected in (("device", device), ("versions", versions())):
        if given[what] != expected:
            raise ValueError(f"{what} must be {expected}, got {str(given[what])[:200]}")
    tuned: TunedTiles = {}
    for entry in _list(given["gemms"], "gemms"):
        entry = _dictionary(entry, ("problem", "tiles"), "an entry of gemms")
        problem = record(GemmProblem, entry["problem"])
        if problem.shape != shape:
            raise ValueError(f"a problem must have {shape}, got {problem}")
        tiles = tuned[_known(problem)] = {}
        for choice in _list(entry["tiles"], "tiles"):
            choice = _dictionary(choice, ("slots", "tile"), "an entry of tiles")
            slots, tile = choice["slots"], record(Tile, choice["tile"])
            if type(slots) is not int or slots < 1:
                raise ValueError(f"slots must be a positive integer, got {slots!r}")
            if reason := why_not(tile, problem, limits):
                raise ValueError(reason)
            tiles[slots] = tile
    return tuned


def record(kind: type[Record], given: Any) -> Record:
    """A NamedTuple from what its ``_asdict()`` became in JSON.

    Raises:
        ValueError: fields missing, unknown, or of another type.
    """
    fields = _dictionary(given, kind._fields, kind.__name__)
    for name, hint in get_type_hints(kind).items():
        if type(fields[name]) is not hint:
            raise ValueError(f"{name} of a {kind.__name__} must be {hint.__name__}, got {fields[name]!r}")
    return kind(**fields)


def _known(problem: GemmProblem) -> GemmProblem:
    for field, accepted in (
        ("gemm", ("gather_gemm", "scatter_gemm")),
        ("dtype", ("bfloat16", "float16", "float32")),
        ("precision", ("16-bit", "ieee", "tf32")),
        ("layout", ("concatenated", "interleaved", "ungated")),
    ):
        if getattr(problem, field) not in accepted:
            raise ValueError(f"{field} must be of {', '.join(accepted)}, got {getattr(problem, field)!r}")
    return problem


def _dictionary(given: Any, keys: tuple[str, ...], what: str) -> dict[str, Any]:
    if not isinstance(given, dict) or set(given) != set(keys):
        got = ", ".join(given) if isinstance(given, dict) else repr(given)[:80]
        raise ValueError(f"{what} must have the fields {', '.join(keys)}, got {got}")
    return given


def _list(given: Any, what: str) -> list[Any]:
    if not isinstance(given, list):
        raise ValueError(f"{what} must be a list, got {repr(given)[:80]}")
    return given


def merged(old: TunedTiles, new: Mapping[GemmProblem, Mapping[int, Tile]]) -> TunedTiles:
    """Both; where they differ, ``new``."""
    return {
        problem: {**old.get(problem, {}), **new.get(problem, {})} for problem in dict.fromkeys([*old, *new])
    }
