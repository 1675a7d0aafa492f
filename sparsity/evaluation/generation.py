"""Batched summary generation for evaluation: length-sorted batches, left padding, shared prompts of beams."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from sparsity.distributed import hide_bar
from sparsity.errors import reported_as
from sparsity.evaluation.predictions import PredictionLog
from sparsity.kv_cache import preallocate
from sparsity.placement import input_device

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

REPEATABLE = (DynamicLayer, DynamicSlidingWindowLayer)  # layers of a cache that beams can share a prompt of


def length_sorted_batches(prompts: list[list[int]], batch_size: int) -> list[list[int]]:
    """Indices of `prompts` in batches of similar length, longest first.

    Similar lengths waste little on padding, and the longest batch coming first makes a lack of memory show at once.
    The batches do not depend on the number of processes, so neither do the rounding errors inside them.

    >>> length_sorted_batches([[5], [5, 6, 7], [5, 6]], batch_size=2)
    [[1, 2], [0]]
    """
    order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), index))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def beam_search_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, beams: int, max_new_tokens: int, min_new_tokens: int
) -> GenerationConfig:
    """A GenerationConfig of beam search alone (greedy for one beam), without the checkpoint's sampling settings.

    Generation stops at the tokenizer's end-of-text token, which training appends to answers, and at those the
    checkpoint names itself.
    """
    from transformers import GenerationConfig

    own = model.generation_config.eos_token_id
    stops = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    return GenerationConfig(
        num_beams=beams,
        do_sample=False,
        early_stopping=beams > 1,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=sorted(stops),
        pad_token_id=tokenizer.pad_token_id,
    )


def generate_batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], config: GenerationConfig
) -> list[str]:
    """Continue every prompt and return only the new text.

    Args:
        prompts: token ids, one list per example; padded on the left to one length L. The attention mask [batch, L]
            shows `generate` where each prompt starts; positions are numbered from there.
    """
    longest = max(map(len, prompts))
    padded = [[tokenizer.pad_token_id] * (longest - len(ids)) + ids for ids in prompts]
    mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
    device = input_device(model)
    inputs = {"input_ids": torch.tensor(padded, device=device), "attention_mask": torch.tensor(mask, device=device)}
    with torch.inference_mode():
        if longest > 1:
            inputs |= shared_prefill(model, **inputs, beams=config.num_beams, new_tokens=config.max_new_tokens)
        # Of the model's own checks: ProphetNet's of positions, RWKV's of beams.
        advice = "try --batch_size 1, which pads nothing, or --beam_size 1"
        with reported_as(f"{type(model).__name__} does not generate from such prompts; {advice}", ValueError):
            output = model.generate(**inputs, generation_config=config)
    texts = tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return [text.strip() for text in texts]


def shared_prefill(
    model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, beams: int, new_tokens: int
) -> dict[str, Any]:
    """Process each prompt once for all its beams; `generate` alone would process it once per beam.

    Args:
        input_ids, attention_mask: int64 tensors [batch, L], L > 1, padded on the left.
        new_tokens: how many the cache must have room for, instead of being copied for every token.

    Returns:
        {"cache": cache of the first L - 1 tokens for batch * beams rows}, for `generate` to continue from, under the
        name that the installed transformers has for it ("past_key_values" in older releases); empty for a model that
        takes no positions or keeps anything but keys and values (recurrent and hybrid ones).
    """
    decoder = model.base_model  # without its head: the logits of a prompt are not needed
    if "position_ids" not in inspect.signature(decoder.forward).parameters:
        return {}
    positions = (attention_mask.cumsum(dim=-1) - 1).clamp_min(0)
    prompt = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": positions}
    output = decoder(**{name: tensor[:, :-1] for name, tensor in prompt.items()}, use_cache=True)
    name = "cache" if "cache" in output else "past_key_values"
    cache = output.get(name)
    if type(cache) is not DynamicCache or any(type(layer) not in REPEATABLE for layer in cache.layers):
        return {}
    return {name: preallocate(cache, input_ids.shape[1] + new_tokens, beams)}


def predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    batches: list[list[int]],
    config: GenerationConfig,
    part: tuple[int, int],
    log: PredictionLog | None,
) -> dict[int, str]:
    """Generate this process's part of the batches, logging each as it is done.

    Args:
        part: (index, count): every count-th batch from the index-th on.
    """
    from tqdm import tqdm

    predictions: dict[int, str] = {}
    index, count = part
    mine = batches[index::count]
    total = sum(map(len, mine))
    with tqdm(total=total, desc="examples", disable=hide_bar()) as progress:
        for batch in mine:
            texts = generate_batch(model, tokenizer, [prompts[item] for item in batch], config)
            done = dict(zip(batch, texts, strict=True))
            if log:
                log.append(index, done)
            predictions.update(done)
            progress.update(len(batch))
    return predictions
