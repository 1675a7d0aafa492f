"""Memory that training takes beyond the weights, gradients and optimizer states included, and saving the result.

    python -m benchmarks.training_memory OPTIONS OF finetune.py

Prints one line of JSON. Measured is the peak from the loaded model to the saved state, less what the process held just
before: libraries, data, weights. `python -m benchmarks.finetuning --parts memory` runs it.
"""

from __future__ import annotations

import json

from benchmarks.process import anonymous_memory
from benchmarks.training_run import read_run
from sparsity.files import prepare_output_dir
from sparsity.sat.model import load_student, load_teacher
from sparsity.sat.trainer import STATE_NAME, build_trainer, save_and_verify
from utils import run_cli


def main() -> None:
    args, tokenizer, train = read_run(__doc__, "python -m benchmarks.training_memory")
    prepare_output_dir(args.training.result_dir)
    student = load_student(args, tokenizer.pad_token_id)
    teacher = load_teacher(args, student.model.get_input_embeddings().weight.shape[0])
    trainer = build_trainer(args, student, teacher, tokenizer, (train, None))
    with anonymous_memory() as result:
        trainer.fit()
        save_and_verify(trainer, student, args.training.result_dir / STATE_NAME)
    print(json.dumps(result))


if __name__ == "__main__":
    run_cli(main)
