"""Self-generated text: its distribution, the cache on disk, and models that cannot write."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_llama
from safetensors.torch import load_file

from sparsity import generated_text as module
from sparsity.errors import UserError
from sparsity.generated_text import generate_text, prompt_of, write_batch
from sparsity.models import load_model

CPU = torch.device("cpu")


@pytest.fixture
def write(model_dir, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SEQUENCES_AT_ONCE", 4)
    return lambda sequences, length=12, seed=0, dense=None: generate_text(
        str(model_dir), tokenizer, sequences, length, CPU, seed, folder=tmp_path / "cache", dense=dense
    )


def test_tokens_are_drawn_with_their_probabilities():
    """Only tokens of the tokenizer, and behind an end-of-text token as anywhere."""
    model = tiny_llama()
    model.lm_head.weight.data *= 30
    model.generation_config.eos_token_id = model.config.eos_token_id = 7
    written = write_batch(model, 20_000, 2, 0, 300, [5])
    assert written.shape == (20_000, 2) and (written[:, 0] == 5).all()
    with torch.no_grad():
        expected = torch.softmax(model(written[:1, :1]).logits[0, -1, :300], 0)
    frequencies = torch.bincount(written[:, 1], minlength=300) / len(written)
    assert expected.max() > 0.02 and len(frequencies) == 300
    torch.testing.assert_close(frequencies, expected, atol=0.015, rtol=0)
    likely_end = write_batch(model, 200, 6, 0, 8, [7])
    assert likely_end.shape == (200, 6) and (likely_end[:, 1:] == 7).any()


def test_text_depends_on_the_seed_alone_and_a_longer_one_begins_with_a_shorter(write):
    text = write(6)
    assert text.shape == (6, 12) and text.dtype == torch.long
    assert torch.equal(write(9)[:6], text) and torch.equal(write(2), text[:2])
    assert not torch.equal(write(6, seed=1), text)
    assert len(set(map(tuple, text.tolist()))) == 6


def test_finished_batches_are_kept_and_damaged_ones_written_again(write, tmp_path, monkeypatch):
    text = write(8)
    files = sorted((tmp_path / "cache").rglob("*.safetensors"))
    assert [len(load_file(file)["input_ids"]) for file in files] == [4, 4]
    content = bytearray(files[1].read_bytes())
    content[-1] ^= 1  # still a token, but another one
    files[1].write_bytes(content)
    written = []
    original = module.write_batch
    monkeypatch.setattr(module, "write_batch", lambda *args: written.append(1) or original(*args))
    assert torch.equal(write(8), text)
    assert len(written) == 1


def test_a_model_is_loaded_only_to_write(write, model_dir, monkeypatch):
    """Whoever has the dense model, in another precision even, gets what is in the cache without loading another."""
    text = write(4)
    dense = load_model(str(model_dir), torch.float64)
    monkeypatch.setattr(module, "load_model", lambda *args: pytest.fail("loaded a model"))
    assert torch.equal(write(4, dense=dense), text)
    monkeypatch.setattr(module, "load_model", load_model)
    assert torch.equal(write(8, dense=dense)[:4], text)


def test_an_interrupted_run_keeps_what_it_has_finished(write, tmp_path, monkeypatch):
    original, calls = module.write_batch, []

    def second_fails(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(module, "write_batch", second_fails)
    with pytest.raises(KeyboardInterrupt):
        write(8)
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 1
    calls.clear()
    monkeypatch.setattr(module, "write_batch", lambda *args: calls.append(1) or original(*args))
    assert len(write(8)) == 8 and len(calls) == 1


@pytest.mark.parametrize("end", ["</s>", ""])
def test_instruct_models_begin_with_a_users_turn_and_without_a_system_prompt(tokenizer, end):
    assert prompt_of(tokenizer) == []
    turns = "{% for m in messages %}<{{ m.role }}> {{ m.content }}" + end + "\n{% endfor %}"
    tokenizer.chat_template = "<system> Be kind.\n" + turns
    try:
        assert tokenizer.decode(prompt_of(tokenizer)) == "<user> "
        tokenizer.chat_template = "{{ raise_exception('no users here') }}"
        assert prompt_of(tokenizer) == []
    finally:
        tokenizer.chat_template = None


def test_model_without_probabilities_is_refused(tmp_path, tokenizer):
    model = tiny_llama()
    model.lm_head.weight.data.fill_(float("nan"))
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="NaN or infinite"):
        generate_text(str(tmp_path / "model"), tokenizer, 2, 8, CPU, folder=tmp_path / "cache")
