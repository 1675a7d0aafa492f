"""Reading records and documents, blocks of tokens, and the prompt."""

from __future__ import annotations

import json

import pytest
from conftest import TEXTS

from sparsity.errors import UserError
from sparsity.text import (
    DEFAULT_TEMPLATE,
    PromptTemplate,
    chat_template,
    encode_prompt,
    read_records,
    read_template,
    read_texts,
    token_blocks,
)

# ----------------------------------------------------------------------------------------------- data


def test_read_records_takes_json_with_bom_and_jsonl(tmp_path, records):
    (tmp_path / "a.json").write_text(json.dumps(records), encoding="utf-8-sig")
    # U+2028 is a line break to str.splitlines, but not to JSONL.
    records = [{**records[0], "input": "one\u2028two"}, *records[1:]]
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in records) + "\n\n")
    assert read_records(tmp_path / "a.json")[1:] == records[1:]
    assert read_records(tmp_path / "b.jsonl") == records


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
        (b'[{"instruction": "\xff"}]', "JSON in UTF-8"),
        (b"[" * 100_000, "not valid JSON"),
        (b'[{"instruction": "a\x00"}]', "not valid JSON"),
    ],
)
def test_read_records_says_what_is_wrong(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_records(tmp_path / "a.json")


def test_read_texts(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo", encoding="utf-8-sig")
    (tmp_path / "b.json").write_text(json.dumps(["one", {"article": "two"}, {"text": "three", "input": "no"}, " "]))
    assert read_texts(tmp_path / "a.txt") == ["one\n\ntwo"]
    assert read_texts(tmp_path / "b.json") == ["one", "two", "three"]
    (tmp_path / "c.json").write_text('[{"body": "x"}]')
    with pytest.raises(UserError, match="item 0 has no column text"):
        read_texts(tmp_path / "c.json")
    (tmp_path / "d.txt").write_text(" \n")
    with pytest.raises(UserError, match="holds no text"):
        read_texts(tmp_path / "d.txt")


def test_token_blocks_are_full_and_part_texts(tokenizer):
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    stream = [token for text in ids for token in [*text, tokenizer.eos_token_id]]
    blocks = token_blocks(tokenizer, TEXTS, 16)
    assert blocks.shape == (len(stream) // 16, 16)
    assert blocks.flatten().tolist() == stream[: blocks.numel()]
    assert token_blocks(tokenizer, TEXTS, 16, limit=2).tolist() == blocks[:2].tolist()
    with pytest.raises(UserError, match="less than one block"):
        token_blocks(tokenizer, TEXTS, 10_000)


# --------------------------------------------------------------------------------------------- prompt


@pytest.mark.parametrize("room", [0, 1, 7, 40])
def test_prompt_is_shortened_in_the_article_only(tokenizer, room):
    record = {"instruction": "Sum.", "input": " ".join(TEXTS), "output": "x"}
    length = len(encode_prompt(tokenizer, {**record, "input": ""}, 1000)[0]) + room
    ids, headless = encode_prompt(tokenizer, record, length)
    assert not headless
    text = tokenizer.decode(ids)
    assert length - 6 <= len(ids) <= length  # as much of the article as fits, but for tokens that merge at the cut
    assert text.startswith(DEFAULT_TEMPLATE.head.replace("{instruction}", "Sum.") + TEXTS[0][: max(0, room - 6)])
    assert text.endswith(DEFAULT_TEMPLATE.tail)


def test_where_no_article_fits_the_head_loses_its_start(tokenizer):
    record = {"instruction": "Sum.", "input": " ".join(TEXTS), "output": "x"}
    bare, _ = encode_prompt(tokenizer, {**record, "input": ""}, 1000)
    for length in (len(bare) - 1, 10, 1):
        assert encode_prompt(tokenizer, record, length) == (bare[-length:], True)


def test_short_prompt_is_left_as_it_is(tokenizer):
    record = {"instruction": "Sum.", "input": " hello ", "output": "x"}
    text = tokenizer.decode(encode_prompt(tokenizer, record, 500)[0])
    assert text == DEFAULT_TEMPLATE.head.replace("{instruction}", "Sum.") + "hello" + DEFAULT_TEMPLATE.tail


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "must hold the two texts"),
        ({"head": "{instruction}"}, "must hold the two texts"),
        ({"head": "{instruction}", "tail": "", "body": ""}, "and nothing else"),
        ({"head": "{instruction}", "tail": 3}, "must hold the two texts"),
        ({"head": "Task:", "tail": ""}, "'head' has no {instruction}"),
        ({"head": "{instruction} {input}", "tail": ""}, "leave out {input}"),
    ],
)
def test_wrong_templates_are_refused(tmp_path, content, message):
    (tmp_path / "t.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        read_template(tmp_path / "t.json")


def test_a_template_of_ones_own_keeps_its_braces(tmp_path, tokenizer):
    (tmp_path / "t.json").write_text(json.dumps({"head": "{x} {instruction}\n", "tail": "\n=>"}))
    template = read_template(tmp_path / "t.json")
    assert template == PromptTemplate("{x} {instruction}\n", "\n=>")
    record = {"instruction": "Sum.", "input": " hello ", "output": "x"}
    assert tokenizer.decode(encode_prompt(tokenizer, record, 500, template)[0]) == "{x} Sum.\nhello\n=>"


def test_chat_template_is_the_tokenizers_own(tokenizer):
    import copy

    chat = copy.deepcopy(tokenizer)
    with pytest.raises(UserError, match="--chat_template: .* no chat template"):
        chat_template(chat)
    chat.chat_template = (
        "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    record = {"instruction": "Sum.", "input": "hello", "output": "x"}
    turn = [{"role": "user", "content": "Sum.\n\nhello"}]
    expected = chat.apply_chat_template(turn, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert encode_prompt(chat, record, 500, chat_template(chat))[0] == expected
    chat.chat_template = "{{ messages[0]['content'][:5] }}"
    with pytest.raises(UserError, match="changes the user's text"):
        chat_template(chat)
