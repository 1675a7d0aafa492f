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
ABBREVIATED = {
    "hf_pts.py": "--calib_siz 3",
    "data_prep.py": "--max_tra 3",
    "finetune.py": "--max_len 3",
    "eval.py": "--beam 2",
    "eval_ppl.py": "--contex 16",
    "export_hf.py": "--overwr",
    "verify_sparsity.py": "--requir 2:4",
    "report.py": "--titl x",
}
# An option, and the default that a user must find beside it.
DEFAULTS = {
    "hf_pts.py": {"--calib_size": "128", "--dtype": "fp16", "--quality": "balanced", "--model_max_length": "1024"},
    "data_prep.py": {"--save_path": "data", "--eval_fraction": "0.05"},
    "finetune.py": {"--lr": "2e-05", "--train_bs": "4", "--num_epochs": "3.0", "--optim": "adamw_torch_fused"},
    "eval.py": {"--beam_size": "4", "--max_new_tokens": "128", "--batch_size": "1", "--device": "auto"},
    "eval_ppl.py": {"--batch_size": "4", "--text_column": "text"},
    "export_hf.py": {"--max_shard_size": "5GB", "--calib_size": "128", "--model_max_length": "1024"},
    "report.py": {"--samples": "4"},
}


def refused(script: str, *words: str):
    result = run_inline(script, *COMPLETE[script].split(), *words)
    assert result.returncode == 2 and result.stderr.startswith("usage: "), result.stderr
    assert_clear_error(result)
    return result.stderr.splitlines()[-1]


@pytest.mark.parametrize("script", COMPLETE)
def test_unknown_options_end_with_code_2(script):
    assert refused(script, "--no_such_option", "3").startswith("error: unrecognized arguments: --no_such_option")


@pytest.mark.parametrize(("script", "words"), ABBREVIATED.items(), ids=ABBREVIATED)
def test_abbreviations_are_refused_and_the_whole_name_is_shown(script, words):
    line = refused(script, *words.split())
    assert line.startswith(f"error: unrecognized arguments: {words}")
    assert f"did you mean {words.split()[0]}" in line


@pytest.mark.parametrize("script", [script for script in COMPLETE if COMPLETE[script]])
def test_missing_arguments_end_with_code_2(script):
    result = run_inline(script)
    assert result.returncode == 2 and result.stderr.startswith("usage: ")
    assert_clear_error(result, "required")


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("hf_pts.py", "--calib_size many"),
        ("hf_pts.py", "--sparsity_fmt dense"),
        ("data_prep.py", "--max_train many"),
        ("eval.py", "--dtype fp8"),
        ("eval.py", "--beam_size 2.5"),
        ("eval_ppl.py", "--context long"),
        ("export_hf.py", "--dtype fp8"),
        ("export_hf.py", "--quantization fp6"),
        ("verify_sparsity.py", "--require 3:7"),
        ("report.py", "--samples few"),
    ],
)
def test_values_of_a_wrong_type_or_choice_end_with_code_2(script, words):
    assert f"argument {words.split()[0]}: invalid" in refused(script, *words.split())


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("hf_pts.py", "--calib_size 0"),
        ("data_prep.py", "--max_train 0"),
        ("finetune.py", "--train_bs 0"),
        ("eval.py", "--beam_size 0"),
        ("eval.py", "--limit 0"),
        ("eval.py", "--min_new_tokens 9999"),
        ("eval_ppl.py", "--context 0"),
        ("eval_ppl.py", "--stride 0"),
        ("report.py", "--samples -1"),
    ],
)
def test_values_out_of_range_end_with_code_1_and_name_the_option(script, words):
    result = run_inline(script, *COMPLETE[script].split(), *words.split())
    assert result.returncode == 1
    assert_clear_error(result, words.split()[0])


def parser_of(script: str, monkeypatch) -> argparse.ArgumentParser:
    """The parser that a script builds, caught when it is about to parse."""
    found = []

    def catch(self, *args, **options):
        found.append(self)
        raise SystemExit(0)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", catch)
    monkeypatch.setattr(sys, "argv", [script])
    with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return found[0]


@pytest.mark.parametrize("script", COMPLETE)
def test_every_default_is_shown_in_the_help(script, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    parser = parser_of(script, monkeypatch)
    text = " ".join(parser.format_help().split())
    shown = 0
    for action in parser._actions:
        if action.default in (None, False, [], "", argparse.SUPPRESS) or action.nargs == 0:
            continue
        help_line = " ".join(parser._get_formatter()._expand_help(action).split())
        default = getattr(action.default, "value", action.default)
        assert f"(default: {default})" in help_line, action.option_strings
        assert help_line in text
        shown += 1
    assert shown or script == "verify_sparsity.py"


@pytest.mark.parametrize(
    ("script", "option", "default"),
    [(script, option, default) for script, found in DEFAULTS.items() for option, default in found.items()],
)
def test_well_known_defaults(script, option, default, monkeypatch):
    parser = parser_of(script, monkeypatch)
    (action,) = [action for action in parser._actions if option in action.option_strings]
    assert parser._get_formatter()._expand_help(action).endswith(f"(default: {default})")


@pytest.mark.parametrize("script", COMPLETE)
def test_every_option_has_a_help_text(script, monkeypatch):
    for action in parser_of(script, monkeypatch)._actions:
        assert action.help, action.option_strings


@pytest.mark.parametrize("script", [script for script in COMPLETE if script != "finetune.py"])
def test_help_loads_neither_torch_nor_transformers(script):
    """finetune.py is left out: its options are those of transformers."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{script!r}, '--help']\n"
        "try:\n"
        f"    runpy.run_path({script!r}, run_name='__main__')\n"
        "except SystemExit as leaving:\n"
        "    assert not leaving.code\n"
        "heavy = {'torch', 'transformers', 'modelopt', 'datasets', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, '')\n{code}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage: ")


def test_a_mistyped_option_is_refused_without_loading_torch():
    code = (
        "import runpy, sys\n"
        "sys.path.insert(0, '')\n"
        "sys.argv = ['eval.py', '--model_dir', 'm', '--data_path', 'd', '--beam', '2']\n"
        "try:\n"
        "    runpy.run_path('eval.py', run_name='__main__')\n"
        "except SystemExit as leaving:\n"
        "    assert leaving.code == 2 and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, timeout=60)
