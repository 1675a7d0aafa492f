r"""Step 2: sparsity-aware training (SAT). Trains the weights that pruning left, with the 2:4 masks held.

    bash launch_finetune.sh --model MODEL --restore_path PTS_DIR/pts_modelopt_state.pth --output_dir OUT \
        --max_length 1024 --num_epochs 3

Reads DATA_PATH/cnn_train.json and cnn_eval.json (see data_prep.py). Loss is taken on the answers only, and on every
token of --text_path. Writes OUT/finetuned_modelopt_state.pth, OUT/train_log.jsonl, OUT/loss.png and OUT/checkpoints.
A killed run resumes with the same command and --resume. Without --restore_path the dense model is trained.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from utils import dataclass_parser, run_cli

if TYPE_CHECKING:
    from sparsity.sat.arguments import SatArguments


def parse_args() -> SatArguments:
    from sparsity.sat.arguments import ARGUMENT_TYPES, SatArguments

    parser = dataclass_parser(
        ARGUMENT_TYPES,
        __doc__,
        prog=os.environ.get("FINETUNE_PROG", "finetune.py"),
        usage="%(prog)s --model MODEL [--restore_path STATE] --output_dir FOLDER [options; --help lists them]",
    )
    return SatArguments(*parser.parse_args_into_dataclasses(look_for_args_file=False))


def main() -> None:
    args = parse_args()

    # Phase 1: cheap checks, before anything heavy is loaded.
    from sparsity import files, models
    from sparsity.sat import memory
    from sparsity.sat.arguments import check_arguments

    check_arguments(args)
    model_args, training = args.model, args.training
    if model_args.modelopt_restore_path:
        files.require_file(model_args.modelopt_restore_path, "PTS state (--restore_path)")
    config = models.load_config(model_args.model_name_or_path, model_args.trust_remote_code)
    models.check_lengths(config, {"--max_length": args.data.model_max_length})
    files.prepare_output_dir(training.result_dir)
    if training.check_only:
        return
    if training.dry_run:
        empty = models.empty_model(config, trust_remote_code=model_args.trust_remote_code)
        print(memory.table(empty, memory.settings_of(args)))
        return

    from transformers.utils import logging

    from sparsity.devices import keep_freed_memory
    from sparsity.distributed import start_processes
    from sparsity.reporting.plots import plot_loss
    from sparsity.sat import resume
    from sparsity.sat.callbacks import read_log
    from sparsity.sat.data import load_data, load_generated, training_samples
    from sparsity.sat.model import load_student, load_teacher
    from sparsity.sat.trainer import STATE_NAME, build_trainer, save_and_verify
    from sparsity.text import choose_template

    logging.set_verbosity_error()
    logging.disable_progress_bar()  # of loading and saving, which take a moment; tokenizing and training keep theirs
    process = start_processes("auto")
    if process.is_main_process:
        files.lock_output_dir(training.result_dir)

    # Phase 2: data. The main process tokenizes it and the others read its cache; all share the writing of
    # self-generated text.
    tokenizer = models.load_tokenizer(model_args.model_name_or_path, model_args.trust_remote_code)
    template = choose_template(args.data.prompt_template, args.data.chat_template, tokenizer)
    with process.main_process_first():
        data = load_data(args, tokenizer, template)
    load_generated(args, data, tokenizer, process.device, process.process_index, process.num_processes)
    process.wait_for_everyone()
    train = training_samples(args, data, load_generated(args, data, tokenizer, process.device))
    checkpoint = resume.find_checkpoint(args)
    training.order_batch = resume.order_batch(args, checkpoint, len(train))
    training.schedule(len(train), data.evaluation is not None)
    if process.is_main_process:
        resume.open_run(args, template, checkpoint)

    # Phase 3: the sparse model and its teacher.
    student = load_student(args, tokenizer.pad_token_id)
    teacher = load_teacher(args, student.model.get_input_embeddings().weight.shape[0])

    # Phase 4: training.
    keep_freed_memory()  # the activations of a step reuse the memory of the last one's
    trainer = build_trainer(args, student, teacher, tokenizer, (train, data.evaluation))
    trainer.fit(checkpoint)
    if trainer.stopper.interrupted:
        step = trainer.state.global_step
        process.print(
            f"stopped by a signal after step {step}, which is saved; resume with the same command and --resume"
        )
        sys.exit(143)

    # Phase 5: the result.
    result = training.result_dir / STATE_NAME
    save_and_verify(trainer, student, result)
    if process.is_main_process:
        plot_loss(read_log(training.result_dir / "train_log.jsonl"), training.result_dir / "loss.png")
        print(f"wrote {result}")
    process.wait_for_everyone()


if __name__ == "__main__":
    run_cli(main, "lower --train_bs or --max_length, or set --lora_rank; --dry_run prints the need")
