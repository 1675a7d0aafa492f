"""Step 0: write the summarization data for fine-tuning and evaluation.

    python data_prep.py --save_path data                                # CNN/DailyMail 3.0.0 from the hub
    python data_prep.py --save_path data --source aclsum                # ACLSum, from its wheel; no hub needed
    python data_prep.py --save_path data --source my.csv --input_column body --output_column abstract

Writes SAVE_PATH/cnn_train.json and SAVE_PATH/cnn_eval.json, JSON lists of {"instruction", "input", "output"}. With
--source aclsum also calib.jsonl (bodies of training papers), further.jsonl (speeches, C++, READMEs) and heldout.jsonl
(bodies of test papers), {"text"} a line, and manual.txt (Python's manual), to measure perplexity on text of another
kind.
An article of the evaluation set is left out of the training set, so that no score is measured on seen text.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

from sparsity import demo_data, records
from sparsity.errors import UserError
from sparsity.files import atomic_path, json_lines, lock_output_dir, prepare_output_dir
from sparsity.text import valid_unicode
from utils import Parser, check_at_least, run_cli


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--save_path", default="data", help="folder for cnn_train.json and cnn_eval.json")

    source = parser.add_argument_group("source")
    source.add_argument(
        "--source",
        metavar="hub|aclsum|PATH",
        default="hub",
        help="hub: cnn_dailymail 3.0.0; aclsum: the data in the wheel aclsum==0.1.2; else a .json, .jsonl, .csv or "
        ".parquet file or a folder of them, where test, eval, val and dev files are for evaluation",
    )
    source.add_argument(
        "--eval_fraction",
        type=float,
        default=0.05,
        help="fraction of a local source set aside for evaluation if it has no evaluation files",
    )
    source.add_argument(
        "--eval_split",
        choices=("test", "validation"),
        default="test",
        help="hub split to evaluate on; papers report test",
    )

    columns = parser.add_argument_group("records")
    columns.add_argument(
        "--input_column", help=f"article column of local files (by default {' or '.join(records.INPUT_COLUMNS)})"
    )
    columns.add_argument(
        "--output_column", help=f"summary column of local files (by default {' or '.join(records.OUTPUT_COLUMNS)})"
    )
    columns.add_argument("--instruction", help="the task as the model reads it (by default one that fits the source)")
    columns.add_argument("--max_samples", type=int, help="write at most this many records to each of the two files")
    return parser.parse_args()


def check_args(args: argparse.Namespace) -> None:
    """Refuse invalid options before anything is read."""
    if not 0 < args.eval_fraction < 1:
        raise UserError(f"--eval_fraction must be between 0 and 1, got {args.eval_fraction}")
    check_at_least(args, 1, "max_samples")


def open_splits(args: argparse.Namespace) -> tuple[Iterator[records.Triple], Iterator[records.Triple]]:
    """The (training, evaluation) triples of the chosen source, both lazy."""
    instruction = args.instruction
    if args.source == "hub":
        return records.hub_triples("train", instruction), records.hub_triples(args.eval_split, instruction)
    if args.source == "aclsum":
        return demo_data.aclsum_triples(("train", "val"), instruction), demo_data.aclsum_triples(("test",), instruction)

    def read(files: list[Path]) -> Iterator[records.Triple]:
        return records.file_triples(files, args.input_column, args.output_column, instruction)

    train_files, eval_files = records.list_files(args.source)
    if not train_files:
        raise UserError(
            f"source {args.source} holds evaluation files only ({eval_files[0].name}, …); add training files"
        )
    if eval_files:
        return read(train_files), read(eval_files)

    def part(evaluation: bool) -> Iterator[records.Triple]:
        """The evaluation part takes the first record and then every further (1/fraction)-th, the same in every run."""
        for index, triple in enumerate(read(train_files)):
            is_eval = index == 0 or int(index * args.eval_fraction) != int((index - 1) * args.eval_fraction)
            if is_eval == evaluation:
                yield triple

    return part(evaluation=False), part(evaluation=True)


def article_key(article: str) -> bytes:
    """16-byte digest of the article that ignores case and white space."""
    return hashlib.blake2b(" ".join(article.lower().split()).encode("utf-8", "replace"), digest_size=16).digest()


def write_records(
    triples: Iterable[records.Triple], stream: TextIO, what: str, limit: int | None, excluded: set[bytes]
) -> set[bytes]:
    """Stream `triples` into a JSON array, skipping empty ones and articles among `excluded`.

    Returns:
        The keys of the written articles.

    Raises:
        UserError: nothing was left to write.
    """
    from tqdm import tqdm

    written: set[bytes] = set()
    count = empty = seen = 0
    for article, summary, instruction in tqdm(triples, f"{what} records", unit="", disable=None):
        if not article.strip() or not summary.strip():
            empty += 1
            continue
        key = article_key(article)
        if key in excluded:
            seen += 1
            continue
        texts = (valid_unicode(text.strip()) for text in (instruction, article, summary))
        record = dict(zip(("instruction", "input", "output"), texts, strict=True))
        stream.write(("[\n" if count == 0 else ",\n") + json.dumps(record, ensure_ascii=False))
        written.add(key)
        count += 1
        if count == limit:
            break
    if count == 0:
        raise UserError(
            f"the {what} set is empty: {empty} records of the source lack text, {seen} are in the evaluation set"
        )
    stream.write("\n]\n")
    skipped = [f"{empty} without text"] * bool(empty) + [f"{seen} that are in the evaluation set"] * bool(seen)
    print(f"{what}: {count} records" + (f" (left out: {', '.join(skipped)})" if skipped else ""))
    return written


def main() -> None:
    args = parse_args()
    check_args(args)
    train, held_out = open_splits(args)
    folder = prepare_output_dir(args.save_path)
    lock_output_dir(folder)
    names = ["cnn_train.json", "cnn_eval.json"]
    if args.source == "aclsum":
        names += ["calib.jsonl", "heldout.jsonl", "manual.txt", "further.jsonl"]
    # The files replace older ones together, at the end: training and evaluation sets never come from two runs.
    with ExitStack() as stack:
        temporaries = [stack.enter_context(atomic_path(folder / name)) for name in names]
        with ExitStack() as open_files:
            streams = [open_files.enter_context(open(path, "w", encoding="utf-8")) for path in temporaries]
            evaluation = write_records(held_out, streams[1], "evaluation", args.max_samples, set())
            write_records(train, streams[0], "training", args.max_samples, evaluation)
            if args.source == "aclsum":
                streams[2].writelines(json_lines(demo_data.aclsum_bodies("train", without="test")))
                streams[3].writelines(json_lines(demo_data.aclsum_bodies("test")))
                streams[4].write(demo_data.python_manual())
                streams[5].writelines(json_lines(demo_data.further_kinds()))
    print("wrote " + ", ".join(str(folder / name) for name in names))


if __name__ == "__main__":
    run_cli(main)
