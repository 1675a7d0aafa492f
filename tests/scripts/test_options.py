"""What every script's command line has in common: errors of the parser, defaults in the help, and a quick help."""

from __future__ import annotations

import argparse
import contextlib
import io
import runpy
import subprocess
import sys

import pytest
from conftest import ROOT, assert_clear_error, run_inline

# Words that make each command line complete, so that only what a test adds is wrong.
COMPLETE = {
    "hf_pts.py": "--model_name_or_path m --output_dir o",
    "data_prep.py": "",
    "finetune.py": "--model m --restore_path p --output_dir o",
    "eval.py": "--model_dir m --data_path d",
    "eval_ppl.py": "--model_dir m --text t",
    "export_hf.py": "--model_dir m --modelopt_restore_path p --output_dir o",
    "verify_sparsity.py": "p",
    "report.py": "--run a=b --output_dir o",
}


def run_wrong(script: str, words: str, code: int) -> str:
    """The error line of the script for wrong words; `code` is 2 for what a parser can know and 1 for the rest."""
    result = run_inline(script, *COMPLETE[script].split(), *words.split())
    assert result.returncode == code, result.stderr
    assert result.stderr.startswith("usage: ") == (code == 2)
    assert_clear_error(result)
    return result.stderr.splitlines()[-1]


@pytest.mark.parametrize("script", COMPLETE)
def test_unknown_options_end_with_code_2(script):
    assert run_wrong(script, "--no_such_option 3", 2).startswith("error: unrecognized arguments: --no_such_option")


@pytest.mark.parametrize(
    ("script", "words"),
    [("hf_pts.py", "--calib_siz 3"), ("finetune.py", "--max_len 3"), ("eval_ppl.py", "--contex 16")],
)
def test_abbreviations_are_refused_and_the_whole_name_is_shown(script, words):
    line = run_wrong(script, words, 2)
    assert line.startswith(f"error: unrecognized arguments: {words}")
    assert f"did you mean {words.split()[0]}" in line


@pytest.mark.parametrize("script", [script for script in COMPLETE if COMPLETE[script]])
def test_missing_arguments_end_with_code_2(script):
    result = run_inline(script)
    assert result.returncode == 2 and result.stderr.startswith("usage: ")
    assert_clear_error(result, "required")


@pytest.mark.parametrize(
    ("script", "words", "code"),
    [
        ("hf_pts.py", "--calib_size many", 2),
        ("hf_pts.py", "--sparsity_fmt dense", 2),
        ("hf_pts.py", "--calib_size 0", 1),
        ("data_prep.py", "--max_samples many", 2),
        ("data_prep.py", "--max_samples 0", 1),
        ("finetune.py", "--train_bs 0", 1),
        ("eval.py", "--dtype fp8", 2),
        ("eval.py", "--beam_size 0", 1),
        ("eval.py", "--min_new_tokens 9999", 1),
        ("eval_ppl.py", "--context 0", 1),
        ("eval_ppl.py", "--stride 0", 1),
        ("export_hf.py", "--quantization fp6", 2),
        ("verify_sparsity.py", "--require 3:70", 1),
        ("report.py", "--samples -1", 1),
    ],
)
def test_wrong_values_are_refused_by_the_option_s_name(script, words, code):
    assert words.split()[0] in run_wrong(script, words, code)


def parser_of(script: str, monkeypatch) -> argparse.ArgumentParser:
    """The parser that a script builds, caught when it is about to parse."""
    parsers = []

    def catch(self, *args, **options):
        parsers.append(self)
        raise SystemExit(0)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", catch)
    monkeypatch.setattr(sys, "argv", [script])
    with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return parsers[0]


@pytest.mark.parametrize("script", COMPLETE)
def test_every_option_has_a_help_text_with_its_default(script, monkeypatch):
    parser = parser_of(script, monkeypatch)
    for action in parser._actions:
        assert action.help, action.option_strings
        if action.default not in (None, False, [], "", argparse.SUPPRESS) and action.nargs != 0:
            default = getattr(action.default, "value", action.default)
            help_line = " ".join(parser._get_formatter()._expand_help(action).split())
            assert f"(default: {default})" in help_line, action.option_strings


@pytest.mark.parametrize("script", [script for script in COMPLETE if script != "finetune.py"])
def test_help_loads_neither_torch_nor_transformers(script):
    """finetune.py is left out: its options are those of transformers."""
    code = f"""
import atexit, runpy, sys
sys.path.insert(0, "")
sys.argv = [{script!r}, "--help"]
heavy = {{"torch", "transformers", "modelopt", "datasets", "numpy", "matplotlib"}}
atexit.register(lambda: print("loaded", *heavy & set(sys.modules)))
runpy.run_path({script!r}, run_name="__main__")
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage: ") and result.stdout.splitlines()[-1] == "loaded"
