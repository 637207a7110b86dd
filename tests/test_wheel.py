"""The wheel holds what the tree holds; the links at the top level lead to the code and are not packed."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (wheel,) = folder.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def test_wheel_holds_the_package_once(wheel_names: set[str]) -> None:
    packed = {name for name in wheel_names if ".dist-info/" not in name}
    tree = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "compile_moe").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packed == tree
    assert "compile_moe/py.typed" in packed


def test_wheel_holds_the_license_and_the_command(wheel_names: set[str]) -> None:
    files = {name.partition(".dist-info/")[2] for name in wheel_names if ".dist-info/" in name}
    assert {"METADATA", "entry_points.txt", "licenses/LICENSE"} <= files


@pytest.mark.parametrize("name", ["ops", "lowering"])
def test_links_at_the_top_level(name: str) -> None:
    link = ROOT / name
    assert link.is_symlink()
    assert link.readlink() == Path("compile_moe", name)
    assert (link / "__init__.py").is_file()
