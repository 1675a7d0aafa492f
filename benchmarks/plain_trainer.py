"""Train the dense model with transformers' own Trainer, as the measure of what masks and losses of ours cost.

    python -m benchmarks.plain_trainer OPTIONS OF finetune.py

Same samples, batches, precision and optimizer as `finetune.py` with these options; the model computes its own loss. It
prints one line of JSON with the useful tokens per second. `python -m benchmarks.finetuning --parts trainer` runs it.
"""

from __future__ import annotations

import json
import time
from typing import Any

from transformers import Trainer, TrainerCallback

from benchmarks.training_run import read_run
from sparsity.models import load_model
from sparsity.sat.data import Collator
from sparsity.sat.loss import model_inputs
from sparsity.sat.model import freeze_embeddings
from utils import run_cli


class Clock(TrainerCallback):
    """Seconds of each step, from the end of the step before."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())


def main() -> None:
    args, tokenizer, train = read_run(__doc__, "python -m benchmarks.plain_trainer")
    model = load_model(args.model.model_name_or_path, "float32")
    if args.training.freeze_embeddings:
        freeze_embeddings(model)
    collate, tokens = Collator(tokenizer.pad_token_id), []

    def collate_plain(items: list[dict[str, Any]]) -> dict[str, Any]:
        batch = collate(items)
        tokens.append(int(batch["real"].sum()))
        return {**model_inputs(model, batch), "labels": batch["labels"]}

    clock = Clock()
    trainer = Trainer(
        model=model, args=args.training, train_dataset=train, data_collator=collate_plain, callbacks=[clock]
    )
    trainer.train()
    steps = len(clock.ends) - 1
    first = min(1, steps - 1)  # the first step warms up
    seconds = clock.ends[-1] - clock.ends[first]
    # The loader collates a batch ahead, so that counts are taken on average.
    print(json.dumps({"tokens_per_second": sum(tokens) / len(tokens) * (steps - first) / seconds}))


if __name__ == "__main__":
    run_cli(main)
