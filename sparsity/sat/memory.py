"""Estimated GPU memory of sparsity-aware training, from the model's shapes and the run's settings."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from sparsity.sat.arguments import SatArguments, option_values

if TYPE_CHECKING:
    from transformers import PretrainedConfig


GIB = 2**30
# Bytes of state per trained parameter; 8, as for Adam in fp32, for those not named.
OPTIMIZER_BYTES = {"adamw_bnb_8bit": 2, "paged_adamw_8bit": 2, "adafactor": 0.01, "sgd": 0}


@dataclass(frozen=True)
class Shapes:
    """Counts of a model's parameters and sizes."""

    parameters: int
    layer_parameters: int  # of one decoder layer
    pruned: int  # weights in layers with masks
    outer_parameters: int  # embeddings, final norm and head
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    embeddings: int = 0  # in embeddings, and in a head that is tied to one


@dataclass(frozen=True)
class Settings:
    """What decides the memory of a run; sizes in bytes, tokens in counts."""

    processes: int
    train_bs: int
    max_length: int
    compute_bytes: int  # 2 for bf16 and fp16, 4 for fp32
    optimizer: str
    optimizer_bytes: float  # per parameter
    checkpointing: bool
    distill: bool
    hidden_loss: bool
    cpu_offload: bool
    teacher_offload: bool
    freeze_embeddings: bool = False


def settings_of(args: SatArguments) -> Settings:
    """The settings of a run, for --world_size GPUs or as many as it has processes."""
    training, distillation = args.training, args.distillation
    optimizer = option_values(args)["optim"]
    return Settings(
        processes=training.world_size_of_dry_run or training.processes,
        train_bs=training.per_device_train_batch_size,
        max_length=args.data.model_max_length,
        compute_bytes=training.compute_dtype.itemsize,
        optimizer=optimizer,
        optimizer_bytes=OPTIMIZER_BYTES.get(optimizer, 8),
        checkpointing=training.recompute,
        distill=distillation.distill,
        hidden_loss=distillation.distill and distillation.distill_hidden > 0,
        cpu_offload=training.cpu_offload,
        teacher_offload=distillation.teacher_offload,
        freeze_embeddings=training.freeze_embeddings,
    )


def model_shapes(config: PretrainedConfig, trust_remote_code: bool = False) -> Shapes:
    """Read the shapes off a model built without memory for its weights."""
    from sparsity.models import decoder_layers, empty_model

    model = empty_model(config, trust_remote_code=trust_remote_code)
    layers = decoder_layers(model)[1]
    linears = [module for module in layers.modules() if isinstance(module, torch.nn.Linear)]
    parameters = sum(weight.numel() for weight in model.parameters())
    in_layers = sum(weight.numel() for weight in layers.parameters())
    text = config.get_text_config()
    return Shapes(
        parameters=parameters,
        layer_parameters=in_layers // len(layers),
        pruned=sum(module.weight.numel() for module in linears),
        outer_parameters=parameters - in_layers,
        layers=len(layers),
        hidden=text.hidden_size,
        intermediate=max(max(module.weight.shape) for module in linears),
        vocabulary=text.vocab_size,
        embeddings=sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding)),
    )


def estimate(shapes: Shapes, run: Settings) -> dict[str, float]:
    """Bytes per GPU by purpose, at the peak of a step.

    Weights, gradients and optimizer state are fp32 and shared evenly among processes. Activations follow the tensors a
    Llama layer keeps for its backward pass: about 8 of the hidden and 4 of the intermediate size in the compute type,
    and two normalizations in fp32. Attention is counted without score matrices, as SDPA computes it.
    """
    share = 1 / run.processes
    trained = shapes.parameters - (shapes.embeddings if run.freeze_embeddings else 0)
    resident = 0 if run.cpu_offload else share
    tokens = run.train_bs * run.max_length
    layer = tokens * (run.compute_bytes * (8 * shapes.hidden + 4 * shapes.intermediate) + 8 * shapes.hidden)
    kept = tokens * shapes.hidden * 4
    in_flight = shapes.layer_parameters if run.checkpointing else shapes.pruned
    parts = {
        "weights, fp32": 4 * shapes.parameters * resident,
        "gradients, fp32": 4 * trained * resident,
        f"optimizer, {run.optimizer}": run.optimizer_bytes * trained * resident,
        "masks, 1 byte": shapes.pruned * (1 + (share if run.processes > 1 else 0)),
        "masked weights at work": (4 + run.compute_bytes) * in_flight,
        "activations": layer + shapes.layers * kept if run.checkpointing else shapes.layers * layer,
        "logits": tokens * shapes.vocabulary * (run.compute_bytes + 8),
    }
    if run.processes > 1:
        unit = max(2 * shapes.layer_parameters, shapes.outer_parameters)
        parts["layers gathered for use"] = unit * run.compute_bytes
    if run.distill:
        teacher = 0 if run.teacher_offload else run.compute_bytes * shapes.parameters * share
        states = 2 * (shapes.layers + 1) * kept if run.hidden_loss else 0
        parts["teacher and its outputs"] = teacher + tokens * shapes.vocabulary * (run.compute_bytes + 8) + states
    return parts


def table(shapes: Shapes, run: Settings) -> str:
    """The estimate as text, one purpose a line."""
    parts = estimate(shapes, run)
    lines = [f"estimated memory per GPU, {run.processes} GPU(s), {shapes.parameters / 1e9:.2f} billion parameters:"]
    lines += [f"  {name:28s} {size / GIB:9.2f} GiB" for name, size in parts.items()]
    lines.append(f"  {'total':28s} {sum(parts.values()) / GIB:9.2f} GiB, without fragmentation (allow 10% more)")
    lines.append(f"host memory while loading: {run.processes * 4 * shapes.parameters / GIB:.1f} GiB on one machine")
    return "\n".join(lines)


def advice(shapes: Shapes, run: Settings) -> str:
    """The three changes of settings that save the most memory, by the estimate, as one line."""
    changes = [("twice as many GPUs (--num_processes)", replace(run, processes=2 * run.processes))]
    if not run.checkpointing:
        changes.append(("--gradient_checkpointing", replace(run, checkpointing=True)))
    if run.train_bs > 1:
        half = run.train_bs // 2
        text = f"--train_bs {half} with more --gradient_accumulation_steps"
        changes.append((text, replace(run, train_bs=half)))
    if run.max_length > 256:
        changes.append((f"--max_length {run.max_length // 2}", replace(run, max_length=run.max_length // 2)))
    if not run.freeze_embeddings:
        changes.append(("--freeze_embeddings", replace(run, freeze_embeddings=True)))
    if run.optimizer_bytes > 1:
        changes.append(("--optim adafactor", replace(run, optimizer="adafactor", optimizer_bytes=0.01)))
    if run.processes > 1 and not run.cpu_offload:
        changes.append(("--cpu_offload (slow)", replace(run, cpu_offload=True)))
    if run.processes > 1 and run.distill and not run.teacher_offload:
        changes.append(("--teacher_offload", replace(run, teacher_offload=True)))
    now = sum(estimate(shapes, run).values())
    savings = sorted(((now - sum(estimate(shapes, new).values()), text) for text, new in changes), reverse=True)
    best = "; ".join(f"{text} saves about {saved / GIB:.1f} GiB" for saved, text in savings[:3])
    return f"The run needs about {now / GIB:.1f} GiB per GPU. Most effective: {best}."
