"""What benchmarks that train in their own process read before any model: options, tokenizer, samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsity.models import load_tokenizer
from sparsity.sat.arguments import ARGUMENT_TYPES, SatArguments
from sparsity.sat.data import load_data, training_samples
from sparsity.text import choose_template
from utils import dataclass_parser

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from sparsity.sat.data import Packed


def read_run(doc: str | None, prog: str) -> tuple[SatArguments, PreTrainedTokenizerBase, Dataset | Packed]:
    """The options of finetune.py from the command line, scheduled without evaluations, and what they train on.

    Args:
        doc, prog: for --help.
    """
    parser = dataclass_parser(ARGUMENT_TYPES, doc, prog=prog)
    args = SatArguments(*parser.parse_args_into_dataclasses(look_for_args_file=False))
    tokenizer = load_tokenizer(args.model.model_name_or_path)
    template = choose_template(args.data.prompt_template, args.data.chat_template, tokenizer)
    train = training_samples(args, load_data(args, tokenizer, template), None)
    args.training.schedule(len(train), evaluates=False)
    return args, tokenizer, train
