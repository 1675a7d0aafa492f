r"""Simulated memory per GPU at scale: the estimate of `finetune.py --dry_run` and the count of torch's memory tracker.

    python -m benchmarks.scale --output benchmarks/results/scale.json

It takes about ten minutes; with --resume, what an interrupted run has simulated is kept.

No GPU runs, and no weights exist. Tensors are torch's fake tensors, which have shapes but no values; the processes are
torch's fake process group, in which one process plays the first of many. In them one optimizer step runs through the
code of training: accelerate's FSDP2 as `sparsity/sat/sharding.py` configures it, activation checkpointing, the loss of
`sparsity/sat/loss.py` with a label at every token, gradient clipping and fused AdamW. torch's tracker adds up every
tensor that is alive. It sees no fragmentation, no workspaces of CUDA libraries and no CUDA context.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.machine import add_output_option, check_output, save_figures
from sparsity.errors import UserError
from sparsity.files import read_json
from sparsity.modelopt_state import mask_name
from sparsity.sat import loss, memory
from sparsity.sat.model import freeze_embeddings
from sparsity.sat.sharding import configure_fsdp, local, shard_teacher
from utils import Parser, run_cli

ATTENTION = "without_score_matrices"
# Published sizes: hidden, intermediate, layers, heads, key and value heads, vocabulary.
MODELS = {
    "Llama-2-7B": (4096, 11008, 32, 32, 32, 32000),
    "Llama-3-8B": (4096, 14336, 32, 32, 8, 128256),
    "Llama-3-70B": (8192, 28672, 80, 64, 8, 128256),
}
KIND = "simulated with fake tensors and fake processes; no GPU ran"
LIMIT = 0.15  # largest accepted difference between estimate and simulation


@dataclass(frozen=True)
class Case:
    """A training run to simulate; `tokens` are those of a row, `teacher` is distillation from the dense model."""

    model: str
    ranks: int
    lora_rank: int = 0
    teacher: bool = False
    tokens: int = 1024
    rows: int = 1
    checkpointing: bool = True

    @property
    def name(self) -> str:
        words = [f"rank {self.lora_rank}" if self.lora_rank else "full"]
        words += ["teacher"] * self.teacher + ["activations kept"] * (not self.checkpointing)
        return f"{self.model}, {self.ranks} GPU(s), {self.rows} x {self.tokens} tokens, {', '.join(words)}"


def cases(models: list[str]) -> list[Case]:
    """What is simulated for each model: full training and low-rank training, and single changes of settings."""
    found = []
    for model in models:
        low_rank = Case(model, 8, lora_rank=64)
        if "70B" in model:
            found += [Case(model, 64), Case(model, 64, teacher=True), low_rank, replace(low_rank, teacher=True)]
            continue
        found += [Case(model, 8), Case(model, 64), Case(model, 8, teacher=True), Case(model, 8, rows=4)]
        found += [low_rank, replace(low_rank, teacher=True), replace(low_rank, ranks=1)]
        if model == "Llama-2-7B":
            found += [Case(model, 16), Case(model, 8, checkpointing=False), replace(low_rank, ranks=1, teacher=True)]
    return found


# ------------------------------------------------------------------------------------------------- fake surroundings


class EveryTokenLabelled(TorchDispatchMode):
    """Answer what depends on values, which fake tensors lack, as if every entry of a bool tensor were true."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if func is aten.nonzero.default:
            return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
        if func is aten.index.Tensor and args[1][0] is not None and args[1][0].dtype == torch.bool:
            values, (selected, *_) = args
            return values.new_empty((selected.numel(), *values.shape[selected.dim() :]))
        return func(*args, **(kwargs or {}))


def fused_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    """Attention without score matrices, as on GPUs; fake tensors on the CPU would take torch's plain formula."""
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, 1) if groups > 1 else tensor for tensor in (key, value))
    output = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, True)[0]
    return output.transpose(1, 2), None


@contextlib.contextmanager
def fake_processes(count: int) -> Iterator[Any]:
    """A fake process group of `count` processes, of which this one is the first; yields its device mesh."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
    try:
        yield dist.init_device_mesh("cpu", (count,), mesh_dim_names=("shards",))
    finally:
        dist.destroy_process_group()


def llama(name: str) -> Any:
    """The configuration of one of MODELS."""
    from transformers import LlamaConfig

    hidden, intermediate, layers, heads, kv_heads, vocabulary = MODELS[name]
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        use_cache=False,
    )


def fake_model(config: Any, dtype: torch.dtype) -> Any:
    """The model of a configuration in fake tensors; call it inside a FakeTensorMode."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION)


# ------------------------------------------------------------------------------------------------------- simulation


def simulate(case: Case) -> dict[str, dict[str, int]]:
    """Bytes at the peaks of the three phases of an optimizer step, by torch's categories."""
    config = llama(case.model)
    with contextlib.ExitStack() as stack:
        mesh = stack.enter_context(fake_processes(case.ranks)) if case.ranks > 1 else None
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        student = build_student(case, config)
        teacher = fake_model(config, torch.bfloat16).requires_grad_(False) if case.teacher else None
        if mesh is None:
            prepared = compute_in_bf16(student, case.checkpointing)
        else:
            prepared = shard(student, case.checkpointing, mesh)
            if teacher is not None:
                layer = type(teacher.model.layers[0]).__name__
                teacher = shard_teacher(teacher, layer, torch.bfloat16, cpu_offload=False, mesh=mesh)
        return step(prepared.train(), student, teacher, case)


def build_student(case: Case, config: Any) -> Any:
    """The model as finetune.py trains it: all weights in float32, or frozen ones in bfloat16 with low-rank updates."""
    if not case.lora_rank:
        model = fake_model(config, torch.float32)
        freeze_embeddings(model)
        return model
    from sparsity.sat.low_rank import add_low_rank

    model = fake_model(config, torch.bfloat16)
    weights = {f"{name}.weight": module.weight for name, module in pruned_layers(model)}
    masks = {mask_name(name): torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    add_low_rank(model, {**weights, **masks}, case.lora_rank, scale=2.0, seed=0, embeddings=False)
    return model


def shard(model: Any, checkpointing: bool, mesh: Any) -> Any:
    """Wrap the model as accelerate does for the Trainer, with the settings of `configure_fsdp`."""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_apply_ac, fsdp2_prepare_model

    configure_fsdp(2, type(model.model.layers[0]).__name__, cpu_offload=False, activation_checkpointing=checkpointing)
    plugin = FullyShardedDataParallelPlugin()
    plugin.set_mixed_precision("bf16")
    plugin.cpu_ram_efficient_loading = False  # there are no weights to load
    accelerator: Any = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="bf16",
        is_main_process=True,
        device=torch.device("cpu"),
        torch_device_mesh=mesh,
        parallelism_config=SimpleNamespace(fsdp_dim_names=mesh.mesh_dim_names),
    )
    if checkpointing:
        plugin.set_auto_wrap_policy(model)
        model = fsdp2_apply_ac(accelerator, model)
    return fsdp2_prepare_model(accelerator, model)


def compute_in_bf16(model: Any, checkpointing: bool) -> Any:
    """What accelerate does to the model of a single process: autocast inside, float32 outputs."""
    from accelerate.utils.operations import convert_outputs_to_fp32

    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.forward = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(model.forward))
    return model


def step(model: Any, student: Any, teacher: Any, case: Case) -> dict[str, dict[str, int]]:
    """Run one optimizer step under torch's tracker; see `simulate`."""
    trained = [weight for weight in student.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    for weight in trained:
        weight.grad = torch.zeros_like(weight)
    update(trained, optimizer)  # makes the moments, and what sharded tensors work out once
    masks = []
    if not case.lora_rank:  # whose frozen weights carry their masks
        masks = [torch.ones_like(local(layer.weight.detach()), dtype=torch.bool) for _, layer in pruned_layers(student)]
    tracker = start_tracker(student, optimizer, teacher, masks)
    ids = torch.zeros(case.rows, case.tokens, dtype=torch.long)
    loss.CPU_CHUNK = loss.GPU_CHUNK  # as on a GPU
    batch = {"input_ids": ids, "labels": ids, "position_ids": ids, "attention_mask": ids + 1}
    batch |= {"real": ids == 0, "plain": ids == 0}
    weights = loss.LossWeights(kl=1.0) if case.teacher else loss.LossWeights()
    peaks = {}
    with EveryTokenLabelled(), tracker:
        value = loss.batch_loss(model, batch, ids.numel() * case.ranks, weights, teacher, student) * case.ranks
        peaks["forward"] = take_peak(tracker)
        value.backward()
        del value
        peaks["backward"] = take_peak(tracker)
        update(trained, optimizer)
        peaks["update"] = take_peak(tracker)
    return peaks


def update(trained: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Clip the gradients, update the weights, and drop the gradients, as the Trainer does."""
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()


def pruned_layers(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """The layers that pruning gives masks: the linear modules of the decoder layers."""
    return [item for item in model.named_modules() if isinstance(item[1], nn.Linear) and "layers" in item[0]]


def start_tracker(student: Any, optimizer: torch.optim.Optimizer, teacher: Any, masks: list[torch.Tensor]) -> Any:
    """The memory tracker of torch, which knows all tensors that exist before the step."""
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.distributed._tools.mem_tracker import MemTracker
    from torch.distributed.fsdp import FSDPModule

    of_teacher = list(teacher.parameters()) if teacher is not None else []
    others = (*masks, *of_teacher)
    sharded: Any = FSDPModule
    if isinstance(student, sharded):
        tracker: Any = FSDPMemTracker(student, optimizer)
        tracker.track_inputs(others)
    else:
        tracker = MemTracker()
        tracker.track_external(student, optimizer, *others)
        no_hook = SimpleNamespace(remove=lambda: None)
        for weight in (*student.parameters(), *of_teacher):
            if not weight.requires_grad:  # the tracker would hook onto the gradient that a frozen weight has not got
                tracker._param_to_grad_hook_handles[weight] = (no_hook, no_hook)
    return tracker


def take_peak(tracker: Any) -> dict[str, int]:
    """Bytes by category at the tracker's peak since the last call, "Total" is their sum; the next peak starts now."""
    device = torch.device("cpu")
    peak = tracker.get_tracker_snapshot("peak")[device]
    tracker._peak_mem_snap = tracker.get_tracker_snapshot("current")
    tracker._peak_mem = {device: tracker._peak_mem_snap[device]["Total"]}
    return {getattr(name, "value", name): size for name, size in peak.items()}


# ------------------------------------------------------------------------------------------------------- comparison


def settings(case: Case) -> memory.Settings:
    """The same run as the estimate sees it."""
    return memory.Settings(
        processes=case.ranks,
        train_bs=case.rows,
        max_length=case.tokens,
        compute_bytes=2,
        optimizer="adamw_torch_fused",
        optimizer_bytes=8,
        checkpointing=case.checkpointing,
        distill=case.teacher,
        cpu_offload=False,
        teacher_offload=False,
        freeze_embeddings=True,
        lora_rank=case.lora_rank,
    )


def compare(case: Case, peaks: dict[str, dict[str, float]]) -> dict[str, Any]:
    """One row of the result, in GiB: the simulated peaks, by phase and category, beside the estimate."""
    phase = max(peaks, key=lambda name: peaks[name]["Total"])
    parts = memory.estimate(memory.model_shapes(llama(case.model)), settings(case))
    estimated = sum(parts.values()) / memory.GIB
    return {
        "name": case.name,
        **asdict(case),
        "simulated_gib": peaks[phase]["Total"],
        "estimated_gib": estimated,
        "estimated / simulated": estimated / peaks[phase]["Total"],
        "peak_in": phase,
        "simulated": peaks,
        "estimated": {name: size / memory.GIB for name, size in parts.items()},
    }


def in_gib(peaks: dict[str, dict[str, int]]) -> dict[str, dict[str, float]]:
    return {phase: {name: size / memory.GIB for name, size in peak.items() if size} for phase, peak in peaks.items()}


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="shapes to simulate")
    parser.add_argument(
        "--resume", action="store_true", help="keep the simulated figures in --output, and estimate again beside them"
    )
    add_output_option(parser, "scale")
    return parser.parse_args()


def main() -> None:
    from tqdm import tqdm
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    args = parse_args()
    check_output(args.output)
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, fused_attention)
    old = read_json(args.output, "figures")["rows"] if args.resume and args.output.is_file() else []
    known = {row["name"]: row["simulated"] for row in old}
    rows = {row["name"]: row for row in old}
    for case in (bar := tqdm(cases(args.models), disable=None)):
        bar.set_description(case.name)
        row = compare(case, known[case.name] if case.name in known else in_gib(simulate(case)))
        rows[case.name] = row
        save_figures({"kind": KIND, "rows": list(rows.values())}, args, torch.device("cpu"), quiet=True)
        bar.write(
            f"{case.name}: simulated {row['simulated_gib']:.2f} GiB, estimated {row['estimated_gib']:.2f} GiB "
            f"({row['estimated / simulated']:.2f}), peak in {row['peak_in']}"
        )
    print(f"figures saved in {args.output}")
    worst = max(abs(row["estimated / simulated"] - 1) for row in rows.values())
    print(f"largest difference between estimate and simulation: {worst:.1%}")
    if worst > LIMIT:
        raise UserError(f"the estimate differs by more than {LIMIT:.0%} from the simulation")


if __name__ == "__main__":
    run_cli(main)
