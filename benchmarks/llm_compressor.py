"""Prune with llm-compressor's SparseGPT and measure it: an arm of pruning.py, which runs this as a process.

    PYTHON -m benchmarks.llm_compressor MODEL TOKENS BATCH_SIZE WEIGHTS

PYTHON may belong to another environment, since llm-compressor asks for versions of its own of some packages. TOKENS is
a safetensors file with `read` [sequences, length] int64. Writes the pruned weights to WEIGHTS (safetensors) and prints
the figures of `benchmarks.process.measured` as JSON in its last line.
"""

from __future__ import annotations

import json
import sys

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from benchmarks.process import measured


def main() -> None:
    from llmcompressor import oneshot
    from llmcompressor.modeling.moe.linearize import repack_moe
    from llmcompressor.modifiers.pruning import SparseGPTModifier
    from transformers import AutoModelForCausalLM

    path, tokens, batch_size, weights = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    sequences = load_file(tokens)["read"]
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in sequences]
    data: DataLoader = DataLoader(rows, batch_size=int(batch_size))  # type: ignore[arg-type]
    model(sequences[:1, :64])  # the libraries allocate their working memory before the measurement begins
    recipe = SparseGPTModifier(sparsity=0.5, mask_structure="2:4", targets=["Linear"], ignore=["re:.*lm_head"])
    with measured() as figures:
        oneshot(model=model, dataset=data, recipe=recipe, num_calibration_samples=len(sequences))
    repack_moe(model)  # experts, which it prunes as linear layers
    names = {name for name, _ in model.named_parameters()}  # without tied copies
    save_file({name: tensor for name, tensor in model.state_dict().items() if name in names}, weights)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
