"""ACLSum (Takeshita et al., 2024): papers with expert summaries, from the wheel `aclsum`; and Python's manual."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sparsity.errors import UserError
from sparsity.files import read_json
from sparsity.records import Triple

SECTIONS = ("abstract", "introduction", "conclusion")
ASPECTS = ("challenge", "approach", "outcome")
INSTRUCTION = "Summarize the challenge, the approach and the outcome of the following paper, in one sentence each."


def aclsum_folder() -> Path:
    """The data folder inside the installed wheel, located without importing it: its dependencies are not needed.

    Raises:
        UserError: the wheel is not installed.
    """
    spec = importlib.util.find_spec("aclsum")
    for folder in (spec and spec.submodule_search_locations) or []:
        if (Path(folder) / "dataset" / "test.jsonl").is_file():
            return Path(folder) / "dataset"
    raise UserError("the ACLSum data set is not installed; run: pip install --no-deps aclsum==0.1.2")


def aclsum_papers(split: str) -> list[dict[str, Any]]:
    """The papers of a split ("train", "val" or "test") with sentences and expert summaries."""
    return read_json(aclsum_folder() / f"{split}.jsonl", "ACLSum split")


def aclsum_triples(splits: Iterable[str], instruction: str | None = None) -> Iterator[Triple]:
    """Triples of article (abstract, introduction, conclusion), summary (one line per aspect) and instruction."""
    for split in splits:
        for paper in aclsum_papers(split):
            sections = [paper["sentences"][name] for name in SECTIONS]
            article = "\n\n".join(" ".join(map(detokenize, sentences)) for sentences in sections if sentences)
            summary = "\n".join(paper["summary"][aspect].strip() for aspect in ASPECTS)
            yield article, summary, instruction or INSTRUCTION


def aclsum_bodies(split: str, without: str | None = None) -> Iterator[dict[str, str]]:
    """{"id", "text"} of the paper bodies in `split`, except papers that are also in the split `without`."""
    excluded = {paper["id"] for paper in aclsum_papers(without)} if without else set()
    for paper in aclsum_papers(split):
        file = aclsum_folder() / "paper_jsons" / f"{paper['id']}.json"
        if paper["id"] not in excluded and file.is_file():
            paragraphs = read_json(file, "ACLSum paper")["pdf_parse"]["body_text"]
            text = "\n".join(paragraph["text"] for paragraph in paragraphs)
            if text.strip():
                yield {"id": paper["id"], "text": text}


def python_manual() -> str:
    """The topics of Python's manual as `help()` shows them; they differ a little between versions of Python."""
    from pydoc_data.topics import topics

    return "\n\n".join(text for _, text in sorted(topics.items()))


def detokenize(sentence: str) -> str:
    """Undo Penn Treebank tokenization.

    >>> detokenize("it ca n't ( yet ) .")
    "it can't (yet)."
    """
    from nltk.tokenize.treebank import TreebankWordDetokenizer

    tokens, inside = [], False
    for token in sentence.split():
        if token == '"':  # straight quotes do not say whether they open or close; they alternate
            token, inside = ("''" if inside else "``"), not inside
        tokens.append(token)
    text = TreebankWordDetokenizer().detokenize(tokens)
    return re.sub(r" ([/–]) ", r"\1", text)
