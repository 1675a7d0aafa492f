"""Estimated GPU memory of sparsity-aware training, from the model's shapes and the run's settings.

`python -m benchmarks.scale` compares the estimate with what torch's memory tracker counts in a simulated step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from sparsity.sat.arguments import SatArguments, option_values
from sparsity.sat.loss import GPU_CHUNK

if TYPE_CHECKING:
    from transformers import PretrainedConfig


GIB = 2**30
# Bytes of state per trained parameter; 8, as for Adam in fp32, for those not named.
OPTIMIZER_BYTES = {"adamw_bnb_8bit": 2, "paged_adamw_8bit": 2, "adafactor": 0.01, "sgd": 0}
CARDS = (24, 40, 80)  # GB of memory, as GPUs are sold
USABLE = 0.9  # share of a card that the estimate may fill; the rest is for fragmentation and CUDA itself
SUGGESTED_RANK = 64  # of the low-rank training that the table of cards shows, where the run has none
SHORTEST = 256  # tokens; a table of cards suggests no shorter rows
MOST_GPUS = 1024


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
    vectors: int = 0  # in normalizations and biases
    sides: int = 0  # rows and columns of all pruned matrices: the parameters of low-rank updates of rank 1
    largest: int = 0  # weights of the largest pruned matrix
    positions: int = 2**17  # longest row that the model was trained for

    @property
    def head(self) -> int:
        """Parameters of the output head."""
        return self.vocabulary * self.hidden


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
    cpu_offload: bool
    teacher_offload: bool
    freeze_embeddings: bool = False
    lora_rank: int = 0
    accumulates: bool = False  # gradients over several micro-batches

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.train_bs * self.max_length

    @property
    def share(self) -> float:
        """Of sharded tensors, how much each process holds."""
        return 1 / self.processes

    @property
    def resident(self) -> float:
        """Of weights, gradients and optimizer state, how much is in the memory of each GPU all the time."""
        return 0 if self.cpu_offload else self.share


def settings_of(args: SatArguments) -> Settings:
    """The settings of a run, for --world_size GPUs or as many as it has processes.

    With --dry_run they are those that the run would have on GPUs, whatever this machine is.
    """
    training, distillation = args.training, args.distillation
    optimizer = option_values(args)["optim"]
    on_gpu = training.dry_run and training.requested_precision == "auto"
    return Settings(
        processes=training.world_size_of_dry_run or training.processes,
        train_bs=training.per_device_train_batch_size,
        max_length=args.data.model_max_length,
        compute_bytes=2 if on_gpu else training.compute_dtype.itemsize,
        optimizer=optimizer,
        optimizer_bytes=OPTIMIZER_BYTES.get(optimizer, 8),
        checkpointing=training.recompute,
        distill=distillation.distill,
        cpu_offload=training.cpu_offload,
        teacher_offload=distillation.teacher_offload,
        freeze_embeddings=training.freeze_embeddings,
        lora_rank=getattr(training, "lora_rank", 0),
        accumulates=training.gradient_accumulation_steps > 1,
    )


def model_shapes(config: PretrainedConfig, trust_remote_code: bool = False) -> Shapes:
    """Read the shapes off a model built without memory for its weights."""
    from sparsity.models import decoder_layers, empty_model

    model = empty_model(config, trust_remote_code=trust_remote_code)
    layers = decoder_layers(model)[1]
    pruned = [module.weight for module in layers.modules() if isinstance(module, torch.nn.Linear)]
    parameters = sum(weight.numel() for weight in model.parameters())
    in_layers = sum(weight.numel() for weight in layers.parameters())
    text = config.get_text_config()
    return Shapes(
        parameters=parameters,
        layer_parameters=in_layers // len(layers),
        pruned=sum(weight.numel() for weight in pruned),
        outer_parameters=parameters - in_layers,
        layers=len(layers),
        hidden=text.hidden_size,
        intermediate=max(max(weight.shape) for weight in pruned),
        vocabulary=text.vocab_size,
        embeddings=sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding)),
        vectors=sum(weight.numel() for weight in model.parameters() if weight.dim() == 1),
        sides=sum(sum(weight.shape) for weight in pruned),
        largest=max(weight.numel() for weight in pruned),
        positions=getattr(text, "max_position_embeddings", None) or 2**17,
    )


# ----------------------------------------------------------------------------------------------------------- estimate


def estimate(shapes: Shapes, run: Settings) -> dict[str, float]:
    """Bytes per GPU by purpose, in the phase of a step that needs the most.

    Weights, gradients and optimizer state are shared evenly among processes; what is trained is fp32, and the frozen
    weights of low-rank training are in the compute type. Attention is counted without score matrices, as SDPA computes
    it, and the update without temporary tensors, as a fused optimizer makes it.
    """
    return max(phases(shapes, run).values(), key=lambda parts: sum(parts.values()))


def phases(shapes: Shapes, run: Settings) -> dict[str, dict[str, float]]:
    """Bytes per GPU by purpose at the peak of each phase of a step."""
    trained, frozen = trained_parameters(shapes, run)
    always = {
        "weights": (4 * trained + run.compute_bytes * frozen if run.lora_rank else 4 * shapes.parameters)
        * run.resident,
        f"optimizer, {run.optimizer}": run.optimizer_bytes * trained * run.resident,
        "masks": 0 if run.lora_rank else shapes.pruned * run.share,  # frozen weights carry their masks
        "teacher's weights": teacher_bytes(shapes, run),
    }
    gradients = 4 * trained * run.resident
    early = gradients if run.accumulates else 0  # gradients before the backward pass has made them
    layer, kept = layer_activations(shapes, run), kept_activations(shapes, run)
    gathered, made = layer_work(shapes, run)
    at_work = "layers at work"
    return {
        "forward": {
            **always,
            "gradients": early,
            "activations": kept + layer / 2,
            at_work: 3 * gathered + autocast_copies(shapes, run),
        },
        "loss": {
            **always,
            "gradients": early,
            "activations": kept,
            "logits": loss_bytes(shapes, run),
            at_work: head_work(shapes, run),
        },
        "teacher": {
            **always,
            "gradients": early,
            "activations": kept,
            "logits": logits_bytes(shapes, run),
            at_work: teacher_work(shapes, run),
        },
        "start of backward": {
            **always,
            "gradients": early,
            "activations": kept,
            at_work: 2 * gathered + made + max(layer, made),
        },
        "end of backward": {
            **always,
            "gradients": gradients,
            "activations": kept / shapes.layers,
            at_work: 2 * gathered + made + max(layer, made),
        },
        "update": {**always, "gradients": gradients},
    }


def trained_parameters(shapes: Shapes, run: Settings) -> tuple[int, int]:
    """How many parameters are trained, and how many are frozen."""
    if not run.lora_rank:
        frozen = shapes.embeddings if run.freeze_embeddings else 0
        return shapes.parameters - frozen, frozen
    outer = 0 if run.freeze_embeddings else shapes.outer_parameters
    return run.lora_rank * shapes.sides + shapes.vectors + outer, shapes.parameters - shapes.vectors - outer


def teacher_bytes(shapes: Shapes, run: Settings) -> float:
    return run.compute_bytes * shapes.parameters * run.share if run.distill and not run.teacher_offload else 0


def layer_activations(shapes: Shapes, run: Settings) -> float:
    """What one decoder layer keeps for its backward pass.

    In a Llama: about 8 tensors of the hidden and 4 of the intermediate size in the compute type, and two normalizations
    in fp32.
    """
    return run.tokens * (run.compute_bytes * (8 * shapes.hidden + 4 * shapes.intermediate) + 8 * shapes.hidden)


def kept_activations(shapes: Shapes, run: Settings) -> float:
    """What all decoder layers keep: everything, or with checkpointing their inputs."""
    # Autocast leaves the sum of all layers in fp32, which FSDP computes in the compute type.
    size = run.compute_bytes if run.processes > 1 or run.lora_rank else 4
    inputs = run.tokens * shapes.hidden * size
    return shapes.layers * (inputs if run.checkpointing else layer_activations(shapes, run))


def layer_work(shapes: Shapes, run: Settings) -> tuple[float, float]:
    """Bytes of a decoder layer gathered from its shards, and of the gradients that its backward pass makes."""
    factors = run.lora_rank * shapes.sides // shapes.layers
    if run.processes == 1:
        return 0, (2 * run.compute_bytes + 1) * shapes.largest if run.lora_rank else 0
    gathered = run.compute_bytes * (shapes.layer_parameters + factors)
    if run.lora_rank:  # the product of the factors, its gradient and the mask, one matrix at a time
        return gathered, run.compute_bytes * factors + (2 * run.compute_bytes + 1) * shapes.largest
    return gathered, run.compute_bytes * shapes.layer_parameters


def head_work(shapes: Shapes, run: Settings) -> float:
    """Bytes of the output head gathered from its shards, and of its gradient."""
    gradient = 0 if run.lora_rank and run.freeze_embeddings else run.compute_bytes * shapes.head
    return gradient + (run.compute_bytes * shapes.head if run.processes > 1 else 0)


def autocast_copies(shapes: Shapes, run: Settings) -> float:
    """Bytes of the copies in the compute type that autocast keeps until the end of a forward pass on one GPU."""
    trained = trained_parameters(shapes, run)[0]
    return run.compute_bytes * trained if run.processes == 1 and run.compute_bytes < 4 else 0


def teacher_work(shapes: Shapes, run: Settings) -> float:
    """Bytes gathered from shards during the teacher's forward pass: its layers, its head and ours."""
    if not run.distill or run.processes == 1:
        return 0
    return run.compute_bytes * (2 * shapes.layer_parameters + 3 * shapes.head)


def logits_bytes(shapes: Shapes, run: Settings) -> float:
    """Bytes of the logits, which a single process turns into fp32."""
    return run.tokens * shapes.vocabulary * (run.compute_bytes if run.processes > 1 else 4)


def loss_bytes(shapes: Shapes, run: Settings) -> float:
    """Bytes at the peak of the loss: logits, their gradient, the teacher's, and some rows in several fp32 tensors."""
    values = run.tokens * shapes.vocabulary
    rows = 4 * min(values, GPU_CHUNK) * (6 if run.distill else 3)
    return 2 * logits_bytes(shapes, run) + run.compute_bytes * values * run.distill + rows


# ------------------------------------------------------------------------------------------------------------ reports


def table(shapes: Shapes, run: Settings) -> str:
    """The estimate as text, one purpose a line, and which cards it fits."""
    parts = estimate(shapes, run)
    kind = f"low-rank training, rank {run.lora_rank}" if run.lora_rank else "full training"
    lines = [
        f"estimated memory per GPU, {run.processes} GPU(s), {shapes.parameters / 1e9:.2f} billion parameters, {kind},",
        f"computing in {8 * run.compute_bytes} bits, activations {'recomputed' if run.checkpointing else 'kept'}:",
    ]
    lines += [f"  {name:28s} {size / GIB:9.2f} GiB" for name, size in parts.items() if size]
    lines.append(f"  {'total':28s} {sum(parts.values()) / GIB:9.2f} GiB, without fragmentation (allow 10% more)")
    lines.append(f"host memory while loading: {host_bytes(shapes, run) / GIB:.1f} GiB on each machine")
    return "\n".join([*lines, *cards(shapes, run)])


def host_bytes(shapes: Shapes, run: Settings) -> float:
    """Bytes of host memory on one machine while the models are loaded: one copy of each, whatever the processes."""
    return shapes.parameters * ((run.compute_bytes if run.lora_rank else 4) + run.compute_bytes * run.distill)


def cards(shapes: Shapes, run: Settings) -> list[str]:
    """Lines of a table: whether full and low-rank training fit usual cards, and if not, what would."""
    rank = run.lora_rank or SUGGESTED_RANK
    rows = {"full training": replace(run, lora_rank=0), f"--lora_rank {rank}": replace(run, lora_rank=rank)}
    lines = [
        f"what fits on {run.processes} GPU(s), with --train_bs {run.train_bs} and --max_length {run.max_length} "
        f"({1 - USABLE:.0%} of the memory left free):",
        "  " + " " * 18 + "".join(f"{f'{card} GB':24s}" for card in CARDS).rstrip(),
    ]
    for name, choice in rows.items():
        lines.append("  " + f"{name:18s}" + "".join(f"{verdict(shapes, choice, card):24s}" for card in CARDS).rstrip())
    return lines


def verdict(shapes: Shapes, run: Settings, card: int) -> str:
    """Whether a run fits GPUs of `card` GB, and the longest rows that do; else how many GPUs it takes."""

    def fits(other: Settings) -> bool:
        return sum(estimate(shapes, other).values()) <= USABLE * card * GIB

    if fits(run):
        lengths = [run.max_length * 2**power for power in range(1, 18) if run.max_length * 2**power <= shapes.positions]
        longest = max((length for length in lengths if fits(replace(run, max_length=length))), default=run.max_length)
        return f"yes, up to {longest} tokens"
    counts = [run.processes * 2**power for power in range(1, 11) if run.processes * 2**power <= MOST_GPUS]
    enough = next((count for count in counts if fits(replace(run, processes=count))), None)
    shorter = range(run.max_length // SHORTEST * SHORTEST, 0, -SHORTEST)
    length = next((length for length in shorter if fits(replace(run, max_length=length))), None)
    ways = ([f"{length} tokens"] if length else []) + ([f"{enough} GPUs"] if enough else [])
    return f"no; {' or '.join(ways)}" if ways else "no"


def advice(shapes: Shapes, run: Settings) -> str:
    """The three changes of settings that save the most memory, by the estimate, as one line."""
    changes = [("twice as many GPUs (--num_processes)", replace(run, processes=2 * run.processes))]
    if not run.lora_rank and shapes.hidden > SUGGESTED_RANK:
        changes.append((f"--lora_rank {SUGGESTED_RANK}", replace(run, lora_rank=SUGGESTED_RANK)))
    if not run.checkpointing:
        changes.append(("--gradient_checkpointing", replace(run, checkpointing=True)))
    if run.train_bs > 1:
        half = run.train_bs // 2
        text = f"--train_bs {half} with more --gradient_accumulation_steps"
        changes.append((text, replace(run, train_bs=half, accumulates=True)))
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
