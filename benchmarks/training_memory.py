"""Memory that training takes beyond the weights, gradients and optimizer states included, and saving the result.

    python -m benchmarks.training_memory OPTIONS OF finetune.py

Prints one line of JSON. Measured is the peak from the loaded model to the saved state, less what the process held just
before: libraries, data, weights. `python -m benchmarks.finetuning --parts memory` runs it.
"""

from __future__ import annotations

import json

from benchmarks.process import anonymous_memory
from sparsity import files, models
from sparsity.sat.arguments import ARGUMENT_TYPES, SatArguments
from sparsity.sat.dataset import load_data, training_samples
from sparsity.sat.model import load_student, load_teacher
from sparsity.sat.result import STATE_NAME, save_and_verify
from sparsity.sat.trainer import build_trainer
from sparsity.text import choose_template
from utils import dataclass_parser, run_cli


def main() -> None:
    parser = dataclass_parser(ARGUMENT_TYPES, __doc__, prog="python -m benchmarks.training_memory")
    args = SatArguments(*parser.parse_args_into_dataclasses(look_for_args_file=False))
    files.prepare_output_dir(args.training.result_dir)
    tokenizer = models.load_tokenizer(args.model.model_name_or_path)
    template = choose_template(args.data.prompt_template, args.data.chat_template, tokenizer)
    train = training_samples(args, load_data(args, tokenizer, template), None)
    args.training.schedule(len(train), evaluates=False)
    student = load_student(args, tokenizer.pad_token_id)
    teacher = load_teacher(args, student.model.get_input_embeddings().weight.shape[0])
    trainer = build_trainer(args, student, teacher, tokenizer, (train, None))
    with anonymous_memory() as result:
        trainer.train()
        save_and_verify(trainer, student, args.training.result_dir / STATE_NAME)
    print(json.dumps(result))


if __name__ == "__main__":
    run_cli(main)
