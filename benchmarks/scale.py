r"""Memory per GPU at scale, simulated: what `finetune.py --dry_run` estimates beside what torch's memory tracker counts.

    python -m benchmarks.scale --output benchmarks/results/scale.json

No GPU runs, and no weights exist. Tensors are torch's fake tensors, which have shapes but no values; the processes are
torch's fake process group, in which one process plays the first of many. In them one optimizer step runs through the
code of training: accelerate's FSDP2 as `sparsity/sat/sharding.py` configures it, activation checkpointing, the loss of
`sparsity/sat/loss.py` with a label at every token, gradient clipping and fused AdamW. torch's tracker adds up every
tensor that is alive. It sees no fragmentation, no workspaces of CUDA libraries and no CUDA context.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.machine import add_output_option, check_output, save_figures
from sparsity.errors import UserError
from sparsity.sat import memory
from sparsity.sat.loss import LossWeights, batch_loss
from sparsity.sat.sharding import configure_fsdp, local, shard_teacher
from utils import Parser, run_cli

ATTENTION = "simulated_flash"
# Published sizes: hidden, intermediate, layers, heads, key and value heads, vocabulary.
MODELS = {
    "Llama-2-7B": (4096, 11008, 32, 32, 32, 32000),
    "Llama-3-8B": (4096, 14336, 32, 32, 8, 128256),
    "Llama-3-70B": (8192, 28672, 80, 64, 8, 128256),
}
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
        large = "70B" in model
        ranks = (16, 64) if large else (8, 16, 64)
        found += [Case(model, count) for count in ranks]
        found += [Case(model, ranks[0], teacher=True), Case(model, ranks[0], rows=4)]
        found += [Case(model, 8, lora_rank=64), Case(model, 8, lora_rank=64, teacher=True)]
        if not large:
            found += [Case(model, 1, lora_rank=64), Case(model, 1, lora_rank=64, teacher=True)]
            found += [Case(model, 8, checkpointing=False), Case(model, 1)]
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


def flash_attention(
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
    model = empty_model(config, dtype).to_empty(device="cpu")
    model.config._attn_implementation = ATTENTION
    return model


# ------------------------------------------------------------------------------------------------------- simulation


def simulate(case: Case) -> tuple[dict[str, int], memory.Settings, memory.Shapes]:
    """Bytes at the peak of one optimizer step, by torch's categories, and what the estimate takes for the same run."""
    config = llama(case.model)
    shapes = memory.model_shapes(config)
    with contextlib.ExitStack() as stack:
        mesh = stack.enter_context(fake_processes(case.ranks)) if case.ranks > 1 else None
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        student, extra = build_student(case, config)
        teacher = fake_model(config, torch.bfloat16).requires_grad_(False) if case.teacher else None
        prepared = shard(student, case.checkpointing, mesh) if mesh else compute_in_bf16(student, case.checkpointing)
        if teacher is not None and mesh:
            teacher = shard_teacher(teacher, type(student.model.layers[0]).__name__, torch.bfloat16, False)
        peak = step(prepared, student, teacher, case, extra)
    return peak, settings(case), shapes


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
