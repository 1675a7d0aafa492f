"""Loading models and tokenizers, and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
from transformers import AutoTokenizer

from sparsity.errors import UserError
from sparsity.models import check_lengths, load_config, load_tokenizer


def save_config(path, **fields):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(fields))
    return str(path)


def test_only_decoders_are_accepted(tmp_path):
    bert = save_config(tmp_path / "bert", model_type="bert", architectures=["BertModel"])
    with pytest.raises(UserError, match="is a BertModel, not a decoder-only"):
        load_config(bert)
    t5 = save_config(
        tmp_path / "t5", model_type="t5", is_encoder_decoder=True, architectures=["T5ForConditionalGeneration"]
    )
    with pytest.raises(UserError, match="not a decoder-only"):
        load_config(t5)
    unknown = save_config(tmp_path / "unknown", model_type="no-such-model")
    with pytest.raises(UserError, match="cannot load a model"):
        load_config(unknown)
    with pytest.raises(UserError, match="no config.json"):
        load_config(str(tmp_path))
    with pytest.raises(UserError, match="cannot load a model from"):
        load_config("no-such-organisation/no-such-model")


@pytest.mark.parametrize("pad", [None, "[PAD]"])
def test_pad_token_that_the_model_lacks_falls_back(pad, model_dir, tmp_path):
    folder = shutil.copytree(model_dir, tmp_path / "model")
    if pad:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_special_tokens({"pad_token": pad})
        tokenizer.save_pretrained(folder)
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.pad_token == tokenizer.eos_token == "</s>"


@pytest.mark.parametrize(
    ("kind", "outcome"),
    [("Llama", "warning"), ("GPTNeoX", "warning"), ("OPT", "error"), ("GPT2", "error"), ("Bloom", "nothing")],
)
def test_more_tokens_than_positions(kind, outcome, capsys):
    """Rotary models compute any position, a learned table ends, and ALiBi has no bound."""
    import transformers

    config = getattr(transformers, f"{kind}Config")()
    lengths = {"--model_max_length": 2000, "--max_new_tokens": 500}
    check_lengths(config, {"--model_max_length": 8})
    assert not capsys.readouterr().err
    if outcome == "error":
        with pytest.raises(
            UserError, match="--model_max_length 2000 plus --max_new_tokens 500 is more than the model's"
        ):
            check_lengths(config, lengths)
    else:
        check_lengths(config, lengths)
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == (outcome == "warning") and all(line.startswith("warning: ") for line in lines)
