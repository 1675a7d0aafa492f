"""What import-linter cannot state about the root, whose scripts belong to no package."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))


def imported(path) -> set[str]:
    """First parts of all module names that a file imports, at its top or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_import_no_other_script(script):
    others = set(SCRIPTS) - {script, "utils"}
    assert not imported(ROOT / f"{script}.py") & others


def test_the_root_holds_only_what_a_user_types():
    assert len(SCRIPTS) <= 10


def test_an_installation_holds_the_package_alone(tmp_path):
    """Not "utils", "eval" or "report", which would hide modules of other projects."""
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(ROOT / "sparsity", source / "sparsity", ignore=shutil.ignore_patterns("__pycache__"))
    for path in [
        *ROOT.glob("*.py"),
        *(ROOT / name for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE")),
    ]:
        shutil.copy(path, source)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--target", target, source], check=True, timeout=120)
    assert {path.name for path in target.iterdir() if path.suffix != ".dist-info"} == {"sparsity"}
