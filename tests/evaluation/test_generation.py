"""Batched beam search against the plainest decoding, for several families of models."""

from __future__ import annotations

import pytest
import torch
from conftest import TEXTS, tiny_llama

from sparsity.evaluation import generation
from sparsity.evaluation.generation import beam_search_config, generate_batch, length_sorted_batches


def greedy_by_hand(model, ids, new_tokens, stop, minimum):
    """Greedy decoding without cache, batch or padding: the plainest thing that can be right."""
    ids, start = list(ids), len(ids)
    with torch.no_grad():
        for step in range(new_tokens):
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
            if step < minimum:
                logits[stop] = -torch.inf
            ids.append(int(logits.argmax()))
            if ids[-1] == stop:
                break
    return ids[start:]


def tiny_model(family: str):
    from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM

    if family == "rotary positions":
        return tiny_llama(seed=3)
    torch.manual_seed(3)
    ids = {"bos_token_id": 0, "eos_token_id": 1}
    if family == "learned positions":
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=4, n_positions=256, **ids)
        ).eval()
    return MambaForCausalLM(
        MambaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2, state_size=4, **ids)
    ).eval()


@pytest.mark.parametrize("family", ["rotary positions", "learned positions"])
def test_batches_give_the_greedy_text_of_single_prompts(tokenizer, family):
    model = tiny_model(family)
    tokenizer.pad_token = tokenizer.eos_token
    prompts = [tokenizer(" ".join(TEXTS)[: 20 + 37 * number])["input_ids"] for number in range(8)]
    config = beam_search_config(model, tokenizer, beams=1, max_new_tokens=24, min_new_tokens=6)
    expected = [
        tokenizer.decode(greedy_by_hand(model, ids, 24, 1, 6), skip_special_tokens=True).strip() for ids in prompts
    ]
    assert len(set(expected)) > 4
    single = [generate_batch(model, tokenizer, [ids], config)[0] for ids in prompts]
    assert single == expected
    (batch,) = length_sorted_batches(prompts, 8)
    batched = generate_batch(model, tokenizer, [prompts[index] for index in batch], config)
    assert dict(zip(batch, batched, strict=True)) == dict(enumerate(expected))


@pytest.mark.parametrize("family", ["rotary positions", "learned positions", "recurrent"])
def test_prompts_processed_once_for_all_beams_give_the_same_text(tokenizer, family, monkeypatch):
    model = tiny_model(family)
    tokenizer.pad_token = tokenizer.eos_token
    # A recurrent model reads padding as text, so its prompts are of one length.
    lengths = [90] * 4 if family == "recurrent" else [20, 200, 70, 130]
    texts = (" ".join(TEXTS)[shift : shift + length] for shift, length in enumerate(lengths))
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    if family == "recurrent":
        prompts = [ids[:30] for ids in prompts]
    config = generation.beam_search_config(model, tokenizer, beams=4, max_new_tokens=24, min_new_tokens=6)
    prefill, caches = generation.shared_prefill, []
    monkeypatch.setattr(generation, "shared_prefill", lambda *args, **kwargs: {})
    expected = generation.generate_batch(model, tokenizer, prompts, config)
    monkeypatch.setattr(
        generation, "shared_prefill", lambda *args, **kwargs: caches.append(prefill(*args, **kwargs)) or caches[-1]
    )
    assert generation.generate_batch(model, tokenizer, prompts, config) == expected
    assert bool(caches[0]) == (family != "recurrent")  # without this the test could pass by never sharing anything


def test_batches_hold_every_example_once_longest_first():
    prompts = [[0] * length for length in (3, 9, 1, 9, 5, 2, 7)]
    batches = length_sorted_batches(prompts, 3)
    assert batches == [[1, 3, 6], [4, 0, 5], [2]]
