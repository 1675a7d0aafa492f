"""Held-out texts of several kinds for the benchmarks, from Python itself and from Debian packages.

    python -m benchmarks.texts demo/texts

downloads two packages with apt-get, without installing them, and writes jargon.txt, an encyclopedia (the Jargon File
4.4.7, public domain, from `jargon-text`), and novel.txt (Jane Austen's "Emma", public domain, from
`r-cran-janeaustenr`, MIT). The Python manual and the code of the standard library come with Python (PSF license).
"""

from __future__ import annotations

import gzip
import re
import subprocess
import sys
import sysconfig
import tempfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from sparsity.demo_data import python_manual
from sparsity.errors import UserError
from sparsity.evaluation.perplexity import measure
from sparsity.files import atomic_path, prepare_output_dir, require_file
from sparsity.text import read_texts, sample_blocks, token_blocks
from utils import Parser, run_cli

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

KINDS = ("papers", "manual", "code", "jargon", "novel")  # calibration and training use the first

PACKAGES = {"jargon": "jargon-text", "novel": "r-cran-janeaustenr"}
CUT = 20_000  # characters of a piece of one long text, so that samples come from all of it
R_STRINGS = b"\0\0\0\x10"  # in R's serialization, the type of a vector of strings


def source_code() -> list[str]:
    """The top-level modules of Python's standard library."""
    return [path.read_text(encoding="utf-8") for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))]


def pieces(path: Path) -> list[str]:
    """A long text file in pieces."""
    text = path.read_text(encoding="utf-8")
    return [text[start : start + CUT] for start in range(0, len(text), CUT)]


def flowing(text: str) -> str:
    """Text with one line per paragraph."""
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n") if part.strip())


def jargon(folder: Path) -> str:
    """The lexicon of the Jargon File."""
    packed = next(folder.rglob("jargon.txt.gz")).read_bytes()
    text = gzip.decompress(packed).decode("utf-8", "replace")
    return flowing(re.sub(r"[ \t]+", " ", text[len(text) // 4 :]))  # after the introduction and the list of entries


def novel(folder: Path) -> str:
    """The first novel of the R package: a vector of lines in R's serialization, behind four bytes of length."""
    packed = next(folder.rglob("janeaustenr/data/Rdata.rdb")).read_bytes()
    data = zlib.decompressobj().decompress(packed[4:])
    at = data.index(R_STRINGS) + 8
    count = int.from_bytes(data[at - 4 : at], "big")
    lines = []
    for _ in range(count):  # each with four bytes of flags and four of length
        size = int.from_bytes(data[at + 4 : at + 8], "big")
        lines.append(data[at + 8 : at + 8 + size].decode("utf-8"))
        at += 8 + size
    return flowing("\n".join(lines))


def held_out(
    tokenizer: PreTrainedTokenizerBase, papers: Path, folder: Path, length: int, count: int
) -> dict[str, torch.Tensor]:
    """Blocks of tokens, int64 [count, length], of every kind of text; see KINDS.

    Args:
        papers: JSONL file of held-out papers.
        folder: the output folder of this module.
    """
    read = {"papers": read_texts(papers), "code": source_code()}
    read |= {name: pieces(folder / f"{name}.txt") for name in PACKAGES}
    blocks = {name: sample_blocks(tokenizer, texts, length, count, 0) for name, texts in read.items()}
    blocks["manual"] = token_blocks(tokenizer, [python_manual()], length, count)
    return {kind: blocks[kind] for kind in KINDS}


def require_texts(folder: Path) -> None:
    """Check that the texts exist.

    Raises:
        UserError: one is missing.
    """
    for name in PACKAGES:
        require_file(folder / f"{name}.txt", "text of `python -m benchmarks.texts`")


def perplexities(model: nn.Module, blocks: dict[str, torch.Tensor], device: torch.device) -> dict[str, float]:
    """Perplexity on the blocks [N, T] of each text."""
    return {kind: measure(model, found, device, 4, found.shape[1])["perplexity"] for kind, found in blocks.items()}


def main() -> None:
    parser = Parser(__doc__, prog="python -m benchmarks.texts")
    parser.add_argument("folder", type=Path, help="output folder")
    folder = prepare_output_dir(parser.parse_args().folder)
    readers = {"jargon": jargon, "novel": novel}
    for name, package in PACKAGES.items():
        with tempfile.TemporaryDirectory() as temporary:
            try:
                subprocess.run(["apt-get", "download", "-qq", package], cwd=temporary, check=True)
                subprocess.run(["dpkg", "-x", next(Path(temporary).glob("*.deb")), "."], cwd=temporary, check=True)
            except (OSError, subprocess.CalledProcessError) as error:
                raise UserError(
                    f"cannot download the Debian package {package} ({error}); use Debian or Ubuntu"
                ) from None
            with atomic_path(folder / f"{name}.txt") as file:
                file.write_text(readers[name](Path(temporary)), encoding="utf-8")
        print(f"wrote {folder / name}.txt", file=sys.stderr)


if __name__ == "__main__":
    run_cli(main)
