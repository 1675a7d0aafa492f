"""utils.py, text_input.py and model_io.py: safe files, data reading, the prompt, devices, models and states."""

from __future__ import annotations

import json
import math
import os
import pickle
import stat

import pytest
import torch
from conftest import TEXTS, tiny_llama

import model_io
import text_input
import utils
from utils import UserError

# ---------------------------------------------------------------------------------------------- files


def test_atomic_path_replaces_only_on_success(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError), utils.atomic_path(target) as temporary:
        temporary.write_text("half of the new")
        raise ZeroDivisionError
    assert target.read_text() == "old"
    with utils.atomic_path(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]


def test_saved_file_has_ordinary_permissions(tmp_path):
    previous = os.umask(0o022)
    try:
        utils.save_json({"a": "é"}, tmp_path / "a.json")
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o644
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"a": "é"}


def test_prepare_output_dir(tmp_path):
    assert utils.prepare_output_dir(tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to the output folder"):
        utils.prepare_output_dir(tmp_path / "file")


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("no such thing"), 1, "error: no such thing"),
        (OSError(28, "No space left on device", "x.bin"), 1, "No space left on device (x.bin)"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_run_cli_turns_foreseen_failures_into_one_line(capsys, error, code, words):
    def main():
        raise error

    with pytest.raises(SystemExit) as caught:
        utils.run_cli(main)
    assert caught.value.code == code
    assert words in capsys.readouterr().err


def test_run_cli_does_not_hide_defects():
    def main():
        raise ValueError("a defect")

    with pytest.raises(ValueError, match="a defect"):
        utils.run_cli(main)


# ----------------------------------------------------------------------------------------------- data


def test_read_records_takes_json_with_bom_and_jsonl(tmp_path, records):
    (tmp_path / "a.json").write_text(json.dumps(records), encoding="utf-8-sig")
    # U+2028 is a line break to str.splitlines, but not to JSONL.
    records = [{**records[0], "input": "one\u2028two"}, *records[1:]]
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in records) + "\n\n")
    assert text_input.read_records(tmp_path / "a.json")[1:] == records[1:]
    assert text_input.read_records(tmp_path / "b.jsonl") == records


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"[]", "has no records"),
        (b'{"instruction": "a"}', "must hold a list"),
        (b'[{"instruction": "a", "input": "b"}]', "record 0 has no text field 'output'"),
        (b'[{"instruction": "a", "input": 3, "output": "c"}]', "no text field 'input'"),
        (b'[{"instruction": "a", "input": "b", "output": " "}]', "empty 'output'"),
        (b'["text"]', "no text field 'instruction'"),
        (b'[{"instruction": "\xff"}]', "not UTF-8"),
        (b"[" * 100_000, "not valid JSON"),
        (b'[{"instruction": "a\x00"}]', "not valid JSON"),
    ],
)
def test_read_records_says_what_is_wrong(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        text_input.read_records(tmp_path / "a.json")


def test_read_texts(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo", encoding="utf-8-sig")
    (tmp_path / "b.json").write_text(json.dumps(["one", {"article": "two"}, {"text": "three", "input": "no"}, " "]))
    assert text_input.read_texts(tmp_path / "a.txt") == ["one\n\ntwo"]
    assert text_input.read_texts(tmp_path / "b.json") == ["one", "two", "three"]
    (tmp_path / "c.json").write_text('[{"body": "x"}]')
    with pytest.raises(UserError, match="item 0 has no field text"):
        text_input.read_texts(tmp_path / "c.json")
    (tmp_path / "d.txt").write_text(" \n")
    with pytest.raises(UserError, match="holds no text"):
        text_input.read_texts(tmp_path / "d.txt")


def test_token_blocks_are_full_and_part_texts(tokenizer):
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    stream = [token for text in ids for token in [*text, tokenizer.eos_token_id]]
    blocks = text_input.token_blocks(tokenizer, TEXTS, 16)
    assert blocks.shape == (len(stream) // 16, 16)
    assert blocks.flatten().tolist() == stream[: blocks.numel()]
    assert text_input.token_blocks(tokenizer, TEXTS, 16, limit=2).tolist() == blocks[:2].tolist()
    with pytest.raises(UserError, match="less than one block"):
        text_input.token_blocks(tokenizer, TEXTS, 10_000)


# --------------------------------------------------------------------------------------------- prompt


@pytest.mark.parametrize("room", [0, 1, 7, 40])
def test_prompt_is_shortened_in_the_article_only(tokenizer, room):
    record = {"instruction": "Sum.", "input": " ".join(TEXTS), "output": "x"}
    length = len(text_input.encode_prompt(tokenizer, {**record, "input": ""}, 1000)) + room
    ids = text_input.encode_prompt(tokenizer, record, length)
    text = tokenizer.decode(ids)
    assert length - 6 <= len(ids) <= length  # as much of the article as fits, but for tokens that merge at the cut
    assert text.startswith(text_input.PROMPT_HEAD.format(instruction="Sum.") + TEXTS[0][: max(0, room - 6)])
    assert text.endswith(text_input.PROMPT_TAIL)


def test_length_too_small_for_the_prompt_alone_is_refused(tokenizer):
    record = {"instruction": "Sum.", "input": " ".join(TEXTS), "output": "x"}
    length = len(text_input.encode_prompt(tokenizer, {**record, "input": ""}, 1000)) - 1
    with pytest.raises(UserError, match=f"max_length {length} is too small"):
        text_input.encode_prompt(tokenizer, record, length)


def test_short_prompt_is_left_as_it_is(tokenizer):
    record = {"instruction": "Sum.", "input": " hello ", "output": "x"}
    text = tokenizer.decode(text_input.encode_prompt(tokenizer, record, 500))
    assert text == text_input.PROMPT_HEAD.format(instruction="Sum.") + "hello" + text_input.PROMPT_TAIL


# ------------------------------------------------------------------------------------ models and states


def test_resolve_device():
    assert model_io.resolve_device("auto").type == "cpu"
    for name in ("cuda", "cuda:1"):
        with pytest.raises(UserError, match="no CUDA GPU"):
            model_io.resolve_device(name)
    with pytest.raises(UserError, match="unknown device 'gpu0'"):
        model_io.resolve_device("gpu0")


def save_config(path, **fields):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(fields))
    return str(path)


def test_only_decoders_are_accepted(tmp_path):
    bert = save_config(tmp_path / "bert", model_type="bert", architectures=["BertModel"])
    with pytest.raises(UserError, match="is a BertModel, not a decoder-only"):
        model_io.load_config(bert)
    t5 = save_config(
        tmp_path / "t5", model_type="t5", is_encoder_decoder=True, architectures=["T5ForConditionalGeneration"]
    )
    with pytest.raises(UserError, match="not a decoder-only"):
        model_io.load_config(t5)
    unknown = save_config(tmp_path / "unknown", model_type="no-such-model")
    with pytest.raises(UserError, match="cannot load a model"):
        model_io.load_config(unknown)
    with pytest.raises(UserError, match="no config.json"):
        model_io.load_config(str(tmp_path))
    with pytest.raises(UserError, match="cannot load a model from"):
        model_io.load_config("no-such-organisation/no-such-model")


def test_missing_pad_token_falls_back(model_dir):
    tokenizer = model_io.load_tokenizer(str(model_dir))
    assert tokenizer.pad_token == tokenizer.eos_token == "</s>"


def test_truncated_weights_are_refused(tmp_path, model_dir):
    for file in model_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(UserError, match="cannot load the weights"):
        model_io.load_model(str(tmp_path))


def test_restored_model_computes_with_the_masked_weights(model_dir, state_path):
    model = model_io.restore_sparse(model_io.load_model(str(model_dir)), state_path)
    state = model_io.load_state(state_path)["model_state_dict"]
    masked = list(model_io.sparse_masks(state))
    assert len(masked) == 14
    reference = model_io.load_model(str(model_dir))
    weights = dict(reference.named_parameters())
    with torch.no_grad():
        for name, weight, mask in masked:
            assert mask.float().mean() == 0.5
            weights[name].copy_(weight * mask)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, reference(ids).logits)
    folded = model_io.restore_sparse(model_io.load_model(str(model_dir)), state_path, fold=True)
    assert type(folded.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert folded.state_dict().keys() == reference.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, folded(ids).logits)


def test_state_of_another_model_is_refused(state_path):
    with pytest.raises(UserError, match="belongs to another model"):
        model_io.restore_sparse(tiny_llama(hidden=64), state_path)
    with pytest.raises(UserError, match="belongs to another model"):
        model_io.restore_sparse(tiny_llama(layers=3), state_path)


class Malicious:
    """A pickle that creates a file when it is loaded carelessly."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_pickled_code_in_a_state_is_not_run(tmp_path):
    trap = tmp_path / "trap"
    state = tmp_path / "state.pth"
    for save in (lambda value: torch.save(value, state), lambda value: state.write_bytes(pickle.dumps(value))):
        save({"modelopt_state": Malicious(str(trap)), "model_state_dict": {}})
        with pytest.raises(UserError, match="not a readable modelopt state"):
            model_io.load_state(state)
        assert not trap.exists()


@pytest.mark.parametrize("keep", [0, 10, 1000, -100])
def test_truncated_state_is_refused(tmp_path, state_path, keep):
    damaged = tmp_path / "state.pth"
    damaged.write_bytes(state_path.read_bytes()[:keep])
    with pytest.raises(UserError, match="not a readable modelopt state"):
        model_io.load_state(damaged)


def test_perplexity_is_exp_of_the_mean_loss(model_dir):
    model = model_io.load_model(str(model_dir))
    blocks = torch.randint(0, 400, (5, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        losses = [model(input_ids=block[None], labels=block[None]).loss.item() for block in blocks]
    expected = math.exp(sum(losses) / len(losses))
    assert model_io.perplexity(model, blocks, torch.device("cpu"), batch_size=2) == pytest.approx(expected, rel=1e-5)


def test_output_folder_is_held_until_the_run_ends(tmp_path):
    def second():
        utils.lock_output_dir(tmp_path)

    def first():
        utils.lock_output_dir(tmp_path)
        with pytest.raises(UserError, match=f"another run .process {os.getpid()}. is writing"):
            second()

    utils.run_cli(first)
    utils.run_cli(second)
