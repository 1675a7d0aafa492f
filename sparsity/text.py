"""Text for a model: records and documents from files, blocks of tokens, and the prompt around an article."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsity.errors import UserError, reported_as
from sparsity.files import read_json, require_file

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PromptTemplate:
    """The text around a record's article, the same in training and evaluation.

    Attributes:
        head: the text before the article, with {instruction} where the record's instruction goes.
        tail: the text after the article; the answer follows it directly.
        special_tokens: whether the tokenizer adds its own first and last tokens. Chat templates spell theirs out.
    """

    head: str
    tail: str
    special_tokens: bool = True

    def prompt(self, instruction: str, article: str) -> str:
        return self.head.replace(INSTRUCTION, instruction) + article + self.tail


INSTRUCTION = "{instruction}"  # placeholder in a template
# Headed sections in the manner of Alpaca.
DEFAULT_TEMPLATE = PromptTemplate(
    "The task below comes with a text to work on. Write an answer that carries out the task.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n",
    "\n\n### Response:\n",
)
DEFAULT_INSTRUCTION = "Summarize the following article."
TEXT_FIELDS = ("text", "input", "article", "document", "content")  # columns of plain text, in order of preference
CHAT_FIELDS = ("messages", "conversations")  # columns of chats, which go before those of plain text
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
RUN_RECORD = "run.json"  # the record that finetune.py writes beside its result
PROMPT_FIELD = "prompt"  # the template in it


# ------------------------------------------------------------------------------------------------------------- files


def valid_unicode(text: str) -> str:
    """`text` with "?" for half surrogate pairs, which broken scrapers leave in JSON and no tokenizer takes."""
    return text.encode("utf-8", "replace").decode("utf-8")


def pick_column(row: Any, chosen: str | None, known: Sequence[str], where: str, hint: str = "") -> str:
    """The text in column `chosen` of a row, or in the first of `known` that the row has; "" for a missing value.

    Args:
        where: names the row in messages.
        hint: what to do about a wrong column; ends the message.

    Raises:
        UserError: the row has no named fields or no such column, or its value is not text.
    """
    if not isinstance(row, dict):
        raise UserError(f"{where} is a {type(row).__name__}, not text or an object with named fields")
    name = chosen or next((column for column in known if column in row), None)
    if name not in row:
        missing = f"'{chosen}'" if chosen else " or ".join(known)
        raise UserError(f"{where} has no column {missing}; its columns are {', '.join(map(str, row))}{hint}")
    value = row[name]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{where}: column '{name}' holds a {type(value).__name__}, not text{hint}")
    return valid_unicode(value)


def row_text(row: Any, column: str | None, where: str, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """The text of a row: its chat, or column `column`, or the first of TEXT_FIELDS.

    Args:
        where: names the row in messages.
        tokenizer: its template puts a chat in writing; without one, the turns are joined by line breaks.

    Raises:
        UserError: no such column, one that holds no text, or a chat that the template refuses.
    """
    chats = [name for name in CHAT_FIELDS if isinstance(row, dict) and isinstance(row.get(name), list)]
    if column or not chats:
        return pick_column(row, column, TEXT_FIELDS, where)
    turns = [dict(turn) if isinstance(turn, Mapping) else {} for turn in row[chats[0]]]
    for turn in turns:
        content = turn.get("content", turn.get("value"))
        if isinstance(content, list):  # of text, images, …
            content = "\n".join(str(part["text"]) for part in content if isinstance(part, dict) and part.get("text"))
        turn["content"] = "" if content is None and "tool_calls" in turn else content
        turn["role"] = turn.get("role") or SHAREGPT_ROLES.get(str(turn.get("from")), "system")
    if not all(isinstance(turn["content"], str) for turn in turns):
        raise UserError(f"{where}: column '{chats[0]}' holds no chat, a list of {{'role', 'content'}}")
    if tokenizer is None or not tokenizer.chat_template:
        return valid_unicode("\n".join(turn["content"] for turn in turns))
    from modelopt.torch.utils.dataset_utils import prepare_messages_for_chat_template

    return valid_unicode(_apply_template(tokenizer, prepare_messages_for_chat_template(turns), where))


def read_records(path: str | Path) -> list[dict[str, str]]:
    """Read instruction / input / output records from a JSON array or a JSONL file.

    Raises:
        UserError: missing, malformed or empty file, or a record without the text fields.
    """
    records = read_json(path, "data file")
    if not isinstance(records, list):
        raise UserError(f"data file {path} must hold a list of records, got {type(records).__name__}")
    if not records:
        raise UserError(f"data file {path} has no records; make it with data_prep.py")
    for number, record in enumerate(records):
        for key in ("instruction", "input", "output"):
            if not isinstance(record, dict) or not isinstance(record.get(key), str):
                raise UserError(f"data file {path}: record {number} has no text field '{key}'; see data_prep.py --help")
        if not record["output"].strip():
            raise UserError(f"data file {path}: record {number} has an empty 'output' (the reference summary)")
    return [
        {key: valid_unicode(value) if isinstance(value, str) else value for key, value in record.items()}
        for record in records
    ]


def read_texts(path: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> list[str]:
    """Read plain documents: .txt, which is one document, .json or .jsonl.

    JSON items are strings, or objects with a text or a chat; see `row_text`.

    Raises:
        UserError: missing, malformed or empty file, or an item without text.
    """
    path = require_file(path, "text file")
    if path.suffix.lower() in (".json", ".jsonl"):
        items = read_json(path, "text file")
        if not isinstance(items, list):
            raise UserError(f"text file {path} must hold a list, got {type(items).__name__}")
        rows = [{TEXT_FIELDS[0]: item} if isinstance(item, str) else item for item in items]
        texts = [row_text(row, None, f"text file {path}: item {n}", tokenizer) for n, row in enumerate(rows)]
    else:
        with reported_as(f"text file {path} is not UTF-8 text; convert it to UTF-8", UnicodeDecodeError):
            texts = [path.read_text(encoding="utf-8-sig")]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise UserError(f"text file {path} holds no text")
    return texts


# ------------------------------------------------------------------------------------------------------------ blocks


def token_blocks(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], block_size: int, limit: int | None = None
) -> torch.Tensor:
    """Join the texts' tokens (an end-of-text token between texts) and cut them into full blocks.

    Returns:
        int64 tensor of shape [blocks, block_size]; at most `limit` blocks, none of them padded.

    Raises:
        UserError: the texts do not fill one block.
    """
    stream: list[int] = []
    for text in texts:
        stream += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        stream.append(tokenizer.eos_token_id)
        if limit is not None and len(stream) >= limit * block_size:
            break
    return _cut_blocks(stream, block_size, limit, "the text")


def _cut_blocks(stream: list[int], block_size: int, limit: int | None, name: str) -> torch.Tensor:
    import torch

    blocks = len(stream) // block_size
    if limit is not None:
        blocks = min(blocks, limit)
    if blocks == 0:
        raise UserError(f"{name} has only {len(stream)} tokens, less than one block of {block_size}")
    return torch.tensor(stream[: blocks * block_size]).view(blocks, block_size)


def sample_blocks(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], block_size: int, limit: int, seed: int, name: str = "the text"
) -> torch.Tensor:
    """Like `token_blocks`, but drawn from as many texts as possible: a window at a random place in each.

    Texts that are short give all they have, and the longer ones share the rest evenly.

    Returns:
        int64 tensor of shape [min(limit, blocks that the texts can fill), block_size].

    Raises:
        UserError: the texts do not fill one block.
    """
    rng = random.Random(seed)
    texts = rng.sample(texts, len(texts))
    need, ids = limit * block_size, []
    for text in texts:
        ids.append([*tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], tokenizer.eos_token_id])
        # Texts many times the need are diverse enough; reading on would only take time.
        if len(ids) >= 4 * limit and sum(map(len, ids)) >= 4 * need:
            break
    share = need
    for rank, length in enumerate(sorted(map(len, ids))):
        share = -(-need // (len(ids) - rank))
        if length >= share:
            break
        need -= length
    stream: list[int] = []
    for tokens in ids:
        start = rng.randrange(max(0, len(tokens) - share) + 1)
        stream += tokens[start : start + share]
    return _cut_blocks(stream, block_size, limit, name)


# ------------------------------------------------------------------------------------------------------------- prompt


def read_template(path: str | Path) -> PromptTemplate:
    """Read a template from a JSON object with the texts "head" and "tail".

    Raises:
        UserError: the file is missing or malformed, or the head has no place for the instruction.
    """
    content = read_json(path, "prompt template")
    if not (isinstance(content, dict) and content.keys() == {"head", "tail"}) or not all(
        isinstance(value, str) for value in content.values()
    ):
        raise UserError(f"prompt template {path} must hold the two texts 'head' and 'tail', and nothing else")
    if INSTRUCTION not in content["head"]:
        raise UserError(
            f"prompt template {path}: 'head' has no {INSTRUCTION}, the placeholder of a record's instruction"
        )
    if "{input}" in content["head"] + content["tail"]:
        raise UserError(f"prompt template {path}: leave out {{input}}; the article goes between 'head' and 'tail'")
    return PromptTemplate(valid_unicode(content["head"]), valid_unicode(content["tail"]))


def chat_template(tokenizer: PreTrainedTokenizerBase) -> PromptTemplate:
    """The tokenizer's own chat template: instruction, blank line and article as the user's turn.

    Raises:
        UserError: there is none, or it does not keep the user's text as it is.
    """
    article = "<article>"
    turn = [{"role": "user", "content": f"{INSTRUCTION}\n\n{article}"}]
    text = _apply_template(tokenizer, turn, "--chat_template", add_generation_prompt=True)
    head, _, tail = text.partition(article)
    if INSTRUCTION not in head or not tail:
        raise UserError("--chat_template: the tokenizer's template changes the user's text; use --prompt_template")
    return PromptTemplate(head, tail, special_tokens=False)


def _apply_template(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, Any]], where: str, **options: Any) -> str:
    # ValueError without a template, errors of jinja in one that is broken or refuses the turns.
    with reported_as(f"{where}: the tokenizer has no chat template for this", Exception):
        return tokenizer.apply_chat_template(turns, tokenize=False, **options)


def choose_template(path: str | Path | None, chat: bool, tokenizer: PreTrainedTokenizerBase) -> PromptTemplate:
    """The template of --prompt_template or --chat_template, else the default one.

    Raises:
        UserError: both are given, or the chosen one cannot be used.
    """
    if path and chat:
        raise UserError("--prompt_template cannot be combined with --chat_template; give one of them")
    if chat:
        return chat_template(tokenizer)
    return read_template(path) if path else DEFAULT_TEMPLATE


def trained_prompt(state: str | Path) -> Any:
    """The prompt template in the run record beside a fine-tuned state, as a dict; None without one."""
    record = Path(state).parent / RUN_RECORD
    content = read_json(record, "run record") if record.is_file() else None
    return content.get(PROMPT_FIELD) if isinstance(content, dict) else None


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    record: dict[str, str],
    max_length: int,
    template: PromptTemplate = DEFAULT_TEMPLATE,
    most: int | None = None,
) -> tuple[list[int], bool]:
    """Token ids of a record's prompt in at most `max_length` tokens, and whether more than its article was shortened.

    The article loses its end. Where not even an empty one fits, the prompt loses its beginning, the template's head.

    Args:
        most: tokens for a prompt without its article, by default `max_length`.
    """

    def encode(article: str) -> list[int]:
        prompt = template.prompt(record["instruction"], article)
        return tokenizer(prompt, add_special_tokens=template.special_tokens, verbose=False)["input_ids"]

    article = record["input"].strip()
    ids = encode(article)
    if len(ids) <= max_length:
        return ids, False
    most = max_length if most is None else most
    article_ids = tokenizer(article, add_special_tokens=False, verbose=False)["input_ids"]
    keep = len(article_ids)
    while len(ids) > max_length:
        if keep == 0:
            return ids[max(0, len(ids) - most) :], len(ids) > most
        # Cutting can change how the tokens at the seam merge, so a loop is needed instead of one subtraction.
        keep = max(0, keep - (len(ids) - max_length))
        ids = encode(tokenizer.decode(article_ids[:keep], skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return ids, False
