"""Estimated GPU memory of sparsity-aware training: weights, gradients, optimizer, activations and logits.

`python -m benchmarks.scale` compares the estimate with what torch's memory tracker counts in a simulated step.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from torch import nn
from transformers.training_args import OptimizerNames

from sparsity.models import decoder_layers
from sparsity.sat.arguments import SatArguments
from sparsity.sat.loss import GPU_CHUNK

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GIB = 2**30
ADAM_BYTES = 8  # of optimizer state per trained parameter
OPTIMIZER_BYTES = {"adamw_bnb_8bit": 2, "paged_adamw_8bit": 2, "adafactor": 0.01, "sgd": 0}  # unlike Adam in fp32


@dataclass(frozen=True)
class Settings:
    """The options of a run that decide its memory."""

    processes: int = 1
    train_bs: int = 1
    max_length: int = 1024
    compute_bytes: int = 2  # 2 for bf16 and fp16, 4 for fp32
    optimizer_bytes: float = ADAM_BYTES
    checkpointing: bool = True
    distill: bool = False
    cpu_offload: bool = False
    freeze_embeddings: bool = True
    lora_rank: int = 0
    accumulates: bool = False  # gradients over several micro-batches


def settings_of(args: SatArguments) -> Settings:
    """The settings of a run; with --dry_run those that it would have on --world_size GPUs, whatever this machine is."""
    training = args.training
    on_gpu = training.dry_run and training.requested_precision == "auto"
    return Settings(
        processes=training.world_size_of_dry_run or training.processes,
        train_bs=training.per_device_train_batch_size,
        max_length=args.data.model_max_length,
        compute_bytes=2 if on_gpu else training.compute_dtype.itemsize,
        optimizer_bytes=OPTIMIZER_BYTES.get(OptimizerNames(training.optim).value, ADAM_BYTES),
        checkpointing=training.recompute,
        distill=args.distillation.distill,
        cpu_offload=training.cpu_offload,
        freeze_embeddings=training.freeze_embeddings,
        lora_rank=training.lora_rank,
        accumulates=training.gradient_accumulation_steps > 1,
    )


def estimate(model: PreTrainedModel, run: Settings) -> dict[str, float]:
    """Bytes per GPU by purpose, at the moment of a step that needs the most.

    The processes share weights, gradients and optimizer state. In a Llama, a layer makes about 8 tensors of the hidden
    and 4 of the intermediate size, and two fp32 normalizations. Attention keeps no score matrices. Fragmentation and
    CUDA's own memory come on top.

    Args:
        model: may be on the meta device.
    """
    size, tokens, sharded = run.compute_bytes, run.train_bs * run.max_length, run.processes > 1
    layers, text = decoder_layers(model)[1], model.config.get_text_config()
    pruned = [module.weight.shape for module in layers.modules() if isinstance(module, nn.Linear)]
    parameters, inside, hidden, vocabulary = count(model), count(layers), text.hidden_size, text.vocab_size
    if run.lora_rank:
        trained = run.lora_rank * sum(map(sum, pruned))
        trained += 0 if run.freeze_embeddings else parameters - inside  # with the last norm and the head
        weights, masks = size * parameters + 4 * trained, 0
    else:
        embeddings = sum(count(module) for module in model.modules() if isinstance(module, nn.Embedding))
        trained = parameters - (embeddings if run.freeze_embeddings else 0)
        experts = sum(weight.numel() for weight in layers.parameters() if weight.dim() == 3)  # stored together
        weights, masks = 4 * parameters, sum(map(prod, pruned)) + experts
    divided = 0 if run.cpu_offload else 1 / run.processes
    always = {
        "weights": weights * divided,
        "masks": masks / run.processes,
        "teacher": size * parameters / run.processes * run.distill,
        "optimizer": run.optimizer_bytes * trained * divided,
    }
    layer = tokens * (size * (8 * hidden + 4 * max(map(max, pruned))) + 8 * hidden)
    stream = tokens * hidden * (size if sharded or run.lora_rank else 4)  # autocast adds up layers in fp32
    kept = len(layers) * (stream if run.checkpointing else layer)
    if not sharded and size < 4:
        kept += size * trained  # copies of the weights that autocast keeps
    working = layer + 3.5 * size * inside / len(layers) * sharded  # two gathered layers and their gradients
    values, heads = tokens * vocabulary, vocabulary * hidden * sharded
    logits = values * (2 * (size if sharded else 4) + size * run.distill) + size * heads * (2 + run.distill)
    logits += 4 * min(values, GPU_CHUNK) * (6 if run.distill else 3)  # the loss works in fp32, on a part at a time
    gradients = 4 * trained * divided
    early = gradients if run.accumulates else 0  # before the backward pass has made them
    loss = {"gradients": early, "activations": kept, "logits": logits}
    start_of_backward = {"gradients": early, "activations": kept + working}
    end_of_backward = {"gradients": gradients, "activations": working}
    return always | max(loss, start_of_backward, end_of_backward, key=lambda parts: sum(parts.values()))


def count(module: nn.Module) -> int:
    """Number of parameters of a module."""
    return sum(weight.numel() for weight in module.parameters())


def total_gib(model: PreTrainedModel, run: Settings) -> float:
    """The estimate in GiB."""
    return sum(estimate(model, run).values()) / GIB


def table(model: PreTrainedModel, run: Settings) -> str:
    """The estimate as text, one purpose a line."""
    kind = f"low-rank training, rank {run.lora_rank}" if run.lora_rank else "full training"
    parameters = count(model)
    host = parameters * ((run.compute_bytes if run.lora_rank else 4) + run.compute_bytes * run.distill)
    lines = [
        f"estimated memory per GPU, {run.processes} GPU(s), {parameters / 1e9:.2f} billion parameters,",
        f"{kind} in {8 * run.compute_bytes} bits, activations {'recomputed' if run.checkpointing else 'kept'}:",
    ]
    lines += [f"  {name:12s} {size / GIB:9.2f} GiB" for name, size in estimate(model, run).items() if size]
    lines.append(f"  {'total':12s} {total_gib(model, run):9.2f} GiB, without fragmentation (allow 10% more)")
    lines.append(f"host memory while loading: {host / GIB:.1f} GiB on each machine")
    return "\n".join(lines)
