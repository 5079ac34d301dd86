"""The layout rules that keep the package importable and the house in order."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "compress").rglob("*.py"))
ONLY = {
    "typer": {
        "compress/cli.py",
        *(f"compress/commands/{x}.py" for x in ("shared", "checkpoints", "choosing", "talk", "bench")),
    },
    "rich": {
        "compress/report/screen.py",
        "compress/report/files.py",
        "compress/report/machine.py",
        "compress/report/talk.py",
    },
}
HEAVY = {"transformers", "datasets", "cupy", "compressed_tensors", "gguf", "accelerate"}


@pytest.mark.parametrize("name", ["kernels", "calib"])
def test_data_folders_hold_no_python(name: str) -> None:
    # an importable ./kernels would shadow the package of that name, which transformers imports
    assert not list((ROOT / name).rglob("*.py"))


def test_no_init_in_tests() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))


def top_level_imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            names |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports(path: Path) -> None:
    here = str(path.relative_to(ROOT))
    names = top_level_imports(path)
    assert not names & HEAVY, "import heavy packages inside functions"
    for package, homes in ONLY.items():
        assert package not in names or here in homes


@pytest.mark.parametrize("folder", ["passes", "packed", "solvers"])
def test_maths_never_sees_a_module(folder: str) -> None:
    for path in (ROOT / "compress" / folder).glob("*.py"):
        text = path.read_text()
        for word in ("blocks", "pipeline", "checkpoint", "nn.Module"):
            assert f"compress.{word}" not in text
            assert word != "nn.Module" or word not in text


def test_help_is_quick_and_light() -> None:
    code = (
        "import sys; import compress.cli; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    begun = time.perf_counter()
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]", f"after {time.perf_counter() - begun:.2f} s"


def test_wheel_holds_the_data_folders(tmp_path: Path) -> None:
    import tomllib

    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert config["package-dir"] == {"compress.calib": "calib", "compress.kernels": "kernels"}
    packages = {str(p.parent.relative_to(ROOT)).replace("/", ".") for p in SOURCES if p.name == "__init__.py"}
    assert packages == set(config["packages"]) - {"compress.calib", "compress.kernels"}
