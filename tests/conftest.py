"""Fixtures: a tiny random Llama with a real byte-level BPE tokenizer, and ways to run the scripts."""

from __future__ import annotations

import atexit
import contextlib
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent

for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ[name] = "1"
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="cache-")  # of text that models write
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("TEST_GPUS", "")  # for test_cuda.py: TEST_GPUS=0
torch.set_num_threads(1)

# pytest --hypothesis-profile=fast takes 50 examples, the same in every run; by default they are chosen anew.
settings.register_profile("full", max_examples=500, deadline=None, database=None)
settings.register_profile("fast", max_examples=50, deadline=None, database=None, derandomize=True)
settings.load_profile("full")

TEXTS = [
    "The river rose slowly through the night, and by morning the lower fields of the valley lay under water.",
    "A committee of engineers met on Tuesday to discuss why the new bridge had been closed for a third time.",
    "Researchers trained a small network on weather records and found that it predicted frost better than rain.",
    "The library will open its reading room on Sundays, after many students had asked for longer hours.",
    "Two ships left the harbour at dawn carrying grain, timber and a cargo of carefully packed instruments.",
]


@pytest.fixture(autouse=True)
def own_environment():
    """Undo what a test sets in the environment: transformers 4 leaves its precision there for all later processes."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys() - {"PYTEST_CURRENT_TEST"}:
        del os.environ[name]
    os.environ.update({name: value for name, value in before.items() if name != "PYTEST_CURRENT_TEST"})


@pytest.fixture(scope="session")
def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    core.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def tiny_llama(
    seed: int = 0, vocab_size: int = 400, hidden: int = 32, layers: int = 2, intermediate: int | None = None
):
    """A random Llama of two layers with grouped-query attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=intermediate or 2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


def sparse_matrix(rows: int = 32, columns: int = 64, seed: int = 0) -> torch.Tensor:
    """A random matrix [rows, columns], pruned to 2:4 by magnitude."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    order = weight.abs().view(rows, -1, 4).argsort(dim=-1)
    mask = torch.ones(rows, columns // 4, 4, dtype=torch.bool).scatter_(2, order[:, :, :2], False)
    return weight.masked_fill(~mask.view(rows, columns), 0)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory, tokenizer) -> Path:
    """Folder of the tiny model and its tokenizer, as save_pretrained writes them. Read only: shared by all tests."""
    path = tmp_path_factory.mktemp("model") / "tiny llama"
    tiny_llama().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def state_path(tmp_path_factory, model_dir) -> Path:
    """A modelopt state of the tiny model with 2:4 magnitude masks, made by modelopt itself."""
    import modelopt.torch.opt as mto
    import modelopt.torch.sparsity as mts
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir)
    model = mts.sparsify(model, "sparse_magnitude")
    path = tmp_path_factory.mktemp("state") / "pts_modelopt_state.pth"
    mto.save(model, path)
    return path


@pytest.fixture(scope="session")
def records() -> list[dict[str, str]]:
    """Ten instruction / input / output records."""
    return [
        {
            "instruction": "Summarize the following article.",
            "input": f"{text} {text}",
            "output": text.split(",")[0] + ".",
        }
        for text in TEXTS * 2
    ]


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory, records) -> Path:
    """A data folder as data_prep.py leaves it: cnn_train.json and cnn_eval.json."""
    path = tmp_path_factory.mktemp("data")
    (path / "cnn_train.json").write_text(json.dumps(records))
    (path / "cnn_eval.json").write_text(json.dumps(records[:5]))
    return path


def run_script(*arguments, check: bool = False, env: dict[str, str] | None = None, timeout: int = 300):
    """Run `python <arguments>` in the project folder; returns the CompletedProcess with text output."""
    command = [sys.executable, *map(str, arguments)]
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=timeout
    )
    if check and result.returncode != 0:
        raise AssertionError(f"{command} exited with {result.returncode}\n{result.stdout}\n{result.stderr}")
    return result


def run_inline(script: str, *arguments):
    """Run a script inside this process: no start-up time, for checks that need no process of their own.

    Args:
        script: a file of the project ("eval.py"), or a module that `python -m` runs ("benchmarks.gpu.table").

    Returns what `run_script` returns; output written past Python's sys.stdout and sys.stderr is not seen.
    """
    stdout, stderr, argv, code = io.StringIO(), io.StringIO(), sys.argv, 0
    sys.argv = [script, *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            run_as_main(script)
    except SystemExit as leaving:
        code = leaving.code or 0
    finally:
        sys.argv = argv
    return subprocess.CompletedProcess([script, *arguments], code, stdout.getvalue(), stderr.getvalue())


def run_as_main(script: str) -> None:
    """Execute a file of the project, or a module by its dotted name, as `__main__`."""
    if script.endswith(".py"):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    else:
        runpy.run_module(script, run_name="__main__")


def assert_clear_error(result, *needles: str) -> None:
    """The process failed with one clear line that contains every needle, and no traceback."""
    assert result.returncode != 0, result.stdout
    assert "Traceback" not in result.stderr, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    for needle in needles:
        assert needle in lines[0], lines[0]
