"""Weights reach sharded models without a whole copy in every process."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
from torch import nn

from sparsity.modelopt_state import load_state, not_plus_zero, sparse_masks
from sparsity.models import load_model, model_without_weights
from sparsity.sat.fsdp import allocate, fill, local


def bytes_held(model: nn.Module) -> int:
    """Bytes of this process's shards of all parameters and buffers."""
    parts = [local(tensor) for tensor in (*model.parameters(), *model.buffers())]
    return sum(part.numel() * part.element_size() for part in parts if not part.is_meta)


def student_on(rank: int, port: int, lora_rank: int, paths: dict[str, str], results: str) -> None:
    """One of two processes that load a student and a teacher; saves what it holds."""
    os.environ.update(WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="localhost")
    os.environ.update(MASTER_PORT=str(port), LOCAL_WORLD_SIZE="2")
    from datasets import Dataset

    from sparsity.models import load_tokenizer
    from sparsity.sat import arguments
    from sparsity.sat.fsdp import fill, full_state, local, masked_weights, rows_of
    from sparsity.sat.low_rank import LowRankLinear
    from sparsity.sat.masking import mask_weights
    from sparsity.sat.model import load_student, load_teacher
    from sparsity.sat.trainer import build_trainer

    run = arguments.SatArguments(
        arguments.ModelArguments(paths["model"], paths["state"]),
        arguments.DataArguments(),
        arguments.DistillationArguments(distill=True),
        arguments.SparseTrainingArguments(
            output_dir=results,
            mixed_precision="no",
            report_to=[],
            freeze_embeddings=lora_rank > 0,
            lora_rank=lora_rank,
        ),
    )
    tokenizer = load_tokenizer(paths["model"])
    data = Dataset.from_dict({"input_ids": [[1]] * 8, "labels": [[1]] * 8, "record": [0] * 8, "length": [1] * 8})
    run.training.schedule(len(data), evaluates=False)
    student = load_student(run, tokenizer.pad_token_id)
    teacher = load_teacher(run, 400)
    trainer = build_trainer(run, student, teacher, tokenizer, (data, None))
    trainer.create_optimizer()
    model = trainer.accelerator.prepare(trainer.model, trainer.optimizer)[0]
    fill(model, student.tensors)  # as the first callback does
    mask_weights(model)
    masks = {name: mask.clone() for name, _, mask in masked_weights(model)}
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear):
            masks[f"{name}.weight"] = not_plus_zero(local(module.weight.data))
    dense = load_model(paths["model"]).state_dict()
    same = all(
        torch.equal(weight.to_local(), rows_of(dense[name], weight))
        for name, weight in trainer.teacher.named_parameters()
    )
    facts = {"bytes": bytes_held(model), "masks": masks, "teacher is the dense model": same}
    facts["frequencies"] = [value for name, value in model.named_buffers() if "inv_freq" in name]
    facts["state"] = full_state(model, student.dtypes, trained_only=False)
    torch.save(facts, f"{results}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [0, 4], ids=["full", "low rank"])
def test_processes_hold_their_part_of_the_state(lora_rank, model_dir, state_path, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    paths = {"model": str(model_dir), "state": str(state_path)}
    torch.multiprocessing.spawn(student_on, (port, lora_rank, paths, str(tmp_path)), nprocs=2)
    facts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    tensors = load_state(state_path)["model_state_dict"]
    masks = {name: mask for name, _, mask in sparse_masks(tensors)}
    weights = sum(tensor.numel() * 4 for tensor in tensors.values() if tensor.dtype != torch.bool)
    pruned = sum(mask.numel() for mask in masks.values())
    other = 2 * 4 * 4 + 1024  # rotary frequencies, and rows that do not divide by two
    own_masks = pruned / 2
    if lora_rank:
        factors = sum(lora_rank * sum(mask.shape) for mask in masks.values())
        own_masks = 4 * factors / 2  # in place of masks, which the weights carry
    for fact in facts:
        assert fact["bytes"] < weights / 2 + own_masks + other
        assert fact["teacher is the dense model"]
        assert len(fact["frequencies"]) >= 1 and fact["frequencies"][0][0] == 1 and fact["frequencies"][0][-1] < 1
    for name, mask in masks.items():
        parts = [fact["masks"][name].flatten() for fact in facts]
        assert torch.equal(torch.cat(parts), mask.flatten())
    assert not facts[1]["state"], "only the main process gathers the result"
    for name, tensor in tensors.items():
        if lora_rank and tensor.dtype == torch.bool:
            continue
        expected = tensor.masked_fill(~masks[name], 0) if name in masks else tensor
        assert torch.equal(facts[0]["state"][name], expected), name


def test_model_without_weights_has_all_other_values(model_dir: Path):
    empty, loaded = model_without_weights(str(model_dir)), load_model(str(model_dir))
    assert all(weight.is_meta for weight in empty.parameters())
    for (name, buffer), (same, other) in zip(empty.named_buffers(), loaded.named_buffers(), strict=True):
        assert name == same and torch.equal(buffer, other)
    allocate(empty)
    fill(empty, loaded.state_dict())
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(empty(input_ids=ids).logits, loaded(input_ids=ids).logits)


def test_shared_parameters_stay_shared():
    model = nn.ModuleDict({"a": nn.Linear(4, 4, device="meta"), "b": nn.Linear(4, 4, device="meta")})
    model["b"].weight = model["a"].weight
    model["a"].weight.requires_grad_(False)
    allocate(model)
    assert model["b"].weight is model["a"].weight and not model["a"].weight.requires_grad
    assert not any(weight.is_meta for weight in model.parameters())
