"""What import-linter cannot state about the root, whose scripts belong to no package."""

from __future__ import annotations

import ast

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
