r"""Simulated memory per GPU at scale: the estimate of `finetune.py --dry_run` and the count of torch's memory tracker.

    python -m benchmarks.scale --output benchmarks/results/scale.json

It takes about ten minutes. No GPU runs, and no weights exist: tensors are torch's fake tensors, which have shapes but
no values, and the processes are torch's fake process group. One optimizer step runs through the code of training: FSDP2
as `sparsity/sat` configures it, activation checkpointing, our loss with a label at every token, gradient clipping and
fused AdamW. torch's tracker adds up every tensor that is alive, but no fragmentation and none of CUDA's own memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.machine import add_output_option, check_output, save_figures
from sparsity.errors import UserError
from sparsity.modelopt_state import mask_name
from sparsity.models import empty_model
from sparsity.sat import loss, memory
from sparsity.sat.fsdp import configure_fsdp, local, shard_teacher
from sparsity.sat.low_rank import add_low_rank
from sparsity.sat.memory import Settings
from sparsity.sat.model import freeze_embeddings
from utils import Parser, run_cli

ATTENTION = "without_score_matrices"
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
MODELS = {  # published sizes, the last one of the vocabulary
    "Llama-2-7B": (4096, 11008, 32, 32, 32, 32000),
    "Llama-3-8B": (4096, 14336, 32, 32, 8, 128256),
    "Llama-3-70B": (8192, 28672, 80, 64, 8, 128256),
}
LIMIT = 0.15  # largest accepted difference between estimate and simulation
FULL, LOW_RANK = Settings(processes=8), Settings(processes=8, lora_rank=64)
LARGE = [replace(FULL, processes=64), LOW_RANK, replace(LOW_RANK, distill=True)]
SMALL = [*LARGE, FULL, replace(FULL, distill=True), replace(FULL, train_bs=4)]
CASES = {
    "Llama-2-7B": [*SMALL, replace(FULL, checkpointing=False)],
    "Llama-3-8B": SMALL,
    "Llama-3-70B": [*LARGE, replace(FULL, processes=64, distill=True)],
}


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


def pruned_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that pruning gives masks: the linear modules of the decoder layers."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in name}


def fake_model(config: LlamaConfig, run: Settings) -> Any:
    """The model as finetune.py trains it: all weights in float32, or frozen ones in bfloat16 with low-rank updates."""
    dtype = torch.bfloat16 if run.lora_rank else torch.float32
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION)
    if not run.lora_rank:
        freeze_embeddings(model)
        return model
    weights = {f"{name}.weight": module.weight for name, module in pruned_layers(model).items()}
    masks = {mask_name(name): torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    add_low_rank(model, {**weights, **masks}, run.lora_rank, scale=2.0, seed=0, embeddings=False)
    return model


# -------------------------------------------------------------------------------------------------------- simulation


def simulate(config: LlamaConfig, run: Settings) -> dict[str, float]:
    """GiB at the peaks of the three phases of an optimizer step."""
    with fake_processes(run.processes) as mesh, FakeTensorMode(allow_non_fake_inputs=True):
        student = fake_model(config, run)
        prepared = prepare(student, run.checkpointing, mesh)
        teacher = None
        if run.distill:
            teacher = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=ATTENTION)
            layer = type(teacher.model.layers[0]).__name__
            teacher = shard_teacher(teacher.requires_grad_(False), layer, torch.bfloat16, mesh)
        return step(prepared.train(), student, teacher, run)


def prepare(model: Any, checkpointing: bool, mesh: Any) -> Any:
    """Wrap the model as accelerate does for the Trainer, with the settings of `configure_fsdp`."""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_apply_ac, fsdp2_prepare_model

    configure_fsdp(type(model.model.layers[0]).__name__, cpu_offload=False, activation_checkpointing=checkpointing)
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


def step(model: Any, student: Any, teacher: Any, run: Settings) -> dict[str, float]:
    """Run one optimizer step under torch's tracker; see `simulate`."""
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker

    trained = [weight for weight in student.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    for weight in trained:
        weight.grad = torch.zeros_like(weight)
    update(trained, optimizer)  # makes the moments, and what sharded tensors work out once
    weights = [] if run.lora_rank else [local(layer.weight.detach()) for layer in pruned_layers(student).values()]
    masks = [torch.ones_like(weight, dtype=torch.bool) for weight in weights]  # low-rank training has none
    tracker = FSDPMemTracker(student, optimizer)
    tracker.track_inputs((*masks, *(teacher.parameters() if teacher is not None else ())))
    ids = torch.zeros(run.train_bs, run.max_length, dtype=torch.long)
    batch = {"input_ids": ids, "labels": ids, "position_ids": ids, "attention_mask": ids + 1, "plain": ids == 0}
    with EveryTokenLabelled(), tracker:
        tokens = ids.numel() * run.processes
        value = loss.batch_loss(model, batch, tokens, teacher, unwrapped=student) * run.processes
        peaks = {"forward": take_peak(tracker)}
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


def take_peak(tracker: Any) -> float:
    """GiB at the tracker's peak since the last call; the next peak starts now."""
    device = torch.device("cpu")
    peak = tracker.get_tracker_snapshot("peak")[device]["Total"]
    tracker._peak_mem_snap = tracker.get_tracker_snapshot("current")
    tracker._peak_mem = {device: tracker._peak_mem_snap[device]["Total"]}
    return peak / memory.GIB


def main() -> None:
    from tqdm import tqdm

    parser = Parser(__doc__)
    add_output_option(parser, "scale")
    args = parser.parse_args()
    check_output(args.output)
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, fused_attention)
    loss.CPU_CHUNK = loss.GPU_CHUNK
    rows = []
    for name, run in tqdm([(name, run) for name, runs in CASES.items() for run in runs], disable=None):
        sizes = dict(zip((*SIZES, "vocab_size"), MODELS[name], strict=True))
        config = LlamaConfig(**sizes, use_cache=False)
        peaks, estimated = simulate(config, run), memory.total_gib(empty_model(config), run)
        changed = {key: value for key, value in asdict(run).items() if value != asdict(Settings())[key]}
        rows.append({"model": name, "run": changed, "simulated_gib": peaks, "estimated_gib": estimated})
        tqdm.write(f"{name}, {changed}: simulated {max(peaks.values()):.2f} GiB, estimated {estimated:.2f} GiB")
        save_figures({"rows": rows}, args, torch.device("cpu"), quiet=True)
    worst = max(abs(row["estimated_gib"] / max(row["simulated_gib"].values()) - 1) for row in rows)
    print(f"figures saved in {args.output}; largest difference between estimate and simulation: {worst:.1%}")
    if worst > LIMIT:
        raise UserError(f"the estimate differs by more than {LIMIT:.0%} from the simulation")


if __name__ == "__main__":
    run_cli(main)
