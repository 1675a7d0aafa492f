"""Small models to prune inside a test, and pruning them."""

from __future__ import annotations

import torch
from transformers import AutoConfig

from sparsity.models import decoder_layers
from sparsity.pts.layer_store import LayerStore
from sparsity.pts.prune import prune_model
from sparsity.pts.recipe import Recipe


def calibration(vocab: int = 400, batches: int = 3):
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, vocab, (2, 24), generator=generator)} for _ in range(batches)]


REFITTED = Recipe(refit_iterations=5)


def prune(model, batches=None, recipe=REFITTED, **more):
    return prune_model(model, batches or calibration(), recipe, torch.device("cpu"), LayerStore(None, ""), **more)


def agree(left: dict, right: dict) -> float:
    """Share of mask entries that are the same; rounding may tip a choice between nearly equal weights."""
    return sum(int((left[n] == right[n]).sum()) for n in left) / sum(mask.numel() for mask in left.values())


ARCHITECTURES = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 8},
    "phi3": {"pad_token_id": 0},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt_neox": {},
}


def small_config(architecture: str):
    sizes = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return AutoConfig.for_model(architecture, **{**sizes, **heads, **ARCHITECTURES[architecture]})


def linears(model) -> set[str]:
    prefix, layers = decoder_layers(model)
    return {name for name, module in layers.named_modules(prefix=prefix) if isinstance(module, torch.nn.Linear)}
