"""Estimated GPU memory of sparsity-aware training: weights, gradients, optimizer, activations and logits.

`python -m benchmarks.scale` compares the estimate with what torch's memory tracker counts in a simulated step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers.training_args import OptimizerNames

from sparsity.models import decoder_layers, empty_model
from sparsity.sat.arguments import SatArguments
from sparsity.sat.loss import GPU_CHUNK

if TYPE_CHECKING:
    from transformers import PretrainedConfig

GIB = 2**30
ADAM_BYTES = 8  # of optimizer state per trained parameter
OPTIMIZER_BYTES = {"adamw_bnb_8bit": 2, "paged_adamw_8bit": 2, "adafactor": 0.01, "sgd": 0}  # unlike Adam in fp32


@dataclass(frozen=True)
class Shapes:
    """Numbers of parameters and sizes of a model."""

    parameters: int
    layer_parameters: int  # in one decoder layer
    pruned: int  # in layers with masks, and in experts that are stored together
    embeddings: int  # also in a head that is tied to them
    sides: int  # rows and columns of all pruned matrices: the parameters of low-rank updates of rank 1
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int


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
    teacher_offload: bool = False
    freeze_embeddings: bool = True
    lora_rank: int = 0
    accumulates: bool = False  # gradients over several micro-batches


def settings_of(args: SatArguments) -> Settings:
    """The settings of a run; with --dry_run those that it would have on --world_size GPUs, whatever this machine is."""
    training, distillation = args.training, args.distillation
    on_gpu = training.dry_run and training.requested_precision == "auto"
    return Settings(
        processes=training.world_size_of_dry_run or training.processes,
        train_bs=training.per_device_train_batch_size,
        max_length=args.data.model_max_length,
        compute_bytes=2 if on_gpu else training.compute_dtype.itemsize,
        optimizer_bytes=OPTIMIZER_BYTES.get(OptimizerNames(training.optim).value, ADAM_BYTES),
        checkpointing=training.recompute,
        distill=distillation.distill,
        cpu_offload=training.cpu_offload,
        teacher_offload=distillation.teacher_offload,
        freeze_embeddings=training.freeze_embeddings,
        lora_rank=training.lora_rank,
        accumulates=training.gradient_accumulation_steps > 1,
    )


def model_shapes(config: PretrainedConfig, trust_remote_code: bool = False) -> Shapes:
    """Read the shapes off a model built without memory for its weights."""
    model = empty_model(config, trust_remote_code=trust_remote_code)
    layers, text = decoder_layers(model)[1], config.get_text_config()
    pruned = [module.weight.shape for module in layers.modules() if isinstance(module, torch.nn.Linear)]
    return Shapes(
        parameters=sum(weight.numel() for weight in model.parameters()),
        layer_parameters=sum(weight.numel() for weight in layers.parameters()) // len(layers),
        pruned=sum(map(torch.Size.numel, pruned)) + sum(w.numel() for w in layers.parameters() if w.dim() == 3),
        embeddings=sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding)),
        sides=sum(sum(shape) for shape in pruned),
        layers=len(layers),
        hidden=text.hidden_size,
        intermediate=max(max(shape) for shape in pruned),
        vocabulary=text.vocab_size,
    )


def estimate(shapes: Shapes, run: Settings) -> dict[str, float]:
    """Bytes per GPU by purpose, at the moment of a step that needs the most.

    The processes share weights, gradients and optimizer state. In a Llama, a layer makes about 8 tensors of the hidden
    and 4 of the intermediate size, and two fp32 normalizations. Attention keeps no score matrices. Fragmentation and
    CUDA's own memory come on top.
    """
    size, tokens, sharded = run.compute_bytes, run.train_bs * run.max_length, run.processes > 1
    if run.lora_rank:
        outer = shapes.parameters - shapes.layers * shapes.layer_parameters  # embeddings, the last norm and the head
        trained = run.lora_rank * shapes.sides + (0 if run.freeze_embeddings else outer)
        weights, masks = size * shapes.parameters + 4 * trained, 0
    else:
        trained = shapes.parameters - (shapes.embeddings if run.freeze_embeddings else 0)
        weights, masks = 4 * shapes.parameters, shapes.pruned
    divided = 0 if run.cpu_offload else 1 / run.processes
    always = {
        "weights": weights * divided,
        "masks": masks / run.processes,
        "teacher": size * shapes.parameters / run.processes * (run.distill and not run.teacher_offload),
        "optimizer": run.optimizer_bytes * trained * divided,
    }
    layer = tokens * (size * (8 * shapes.hidden + 4 * shapes.intermediate) + 8 * shapes.hidden)
    stream = tokens * shapes.hidden * (size if sharded or run.lora_rank else 4)  # autocast adds up layers in fp32
    kept = shapes.layers * (stream if run.checkpointing else layer)
    if not sharded and size < 4:
        kept += size * trained  # copies of the weights that autocast keeps
    working = layer + 3.5 * size * shapes.layer_parameters * sharded  # two gathered layers and their gradients
    values, heads = tokens * shapes.vocabulary, shapes.vocabulary * shapes.hidden * sharded
    logits = values * (2 * (size if sharded else 4) + size * run.distill) + size * heads * (2 + run.distill)
    logits += 4 * min(values, GPU_CHUNK) * (6 if run.distill else 3)  # the loss works in fp32, on a part at a time
    gradients = 4 * trained * divided
    early = gradients if run.accumulates else 0  # before the backward pass has made them
    loss = {"gradients": early, "activations": kept, "logits": logits}
    start_of_backward = {"gradients": early, "activations": kept + working}
    end_of_backward = {"gradients": gradients, "activations": working}
    return always | max(loss, start_of_backward, end_of_backward, key=lambda parts: sum(parts.values()))


def total_gib(shapes: Shapes, run: Settings) -> float:
    """The estimate in GiB."""
    return sum(estimate(shapes, run).values()) / GIB


def table(shapes: Shapes, run: Settings) -> str:
    """The estimate as text, one purpose a line."""
    kind = f"low-rank training, rank {run.lora_rank}" if run.lora_rank else "full training"
    host = shapes.parameters * ((run.compute_bytes if run.lora_rank else 4) + run.compute_bytes * run.distill)
    lines = [
        f"estimated memory per GPU, {run.processes} GPU(s), {shapes.parameters / 1e9:.2f} billion parameters,",
        f"{kind} in {8 * run.compute_bytes} bits, activations {'recomputed' if run.checkpointing else 'kept'}:",
    ]
    lines += [f"  {name:12s} {size / GIB:9.2f} GiB" for name, size in estimate(shapes, run).items() if size]
    lines.append(f"  {'total':12s} {total_gib(shapes, run):9.2f} GiB, without fragmentation (allow 10% more)")
    lines.append(f"host memory while loading: {host / GIB:.1f} GiB on each machine")
    return "\n".join(lines)
