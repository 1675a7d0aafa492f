"""Cross entropy, distillation, and gradients under masks."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_llama

from sparsity.modelopt_state import restore_sparse
from sparsity.models import load_model
from sparsity.sat.data import Collator, encode_records
from sparsity.sat.loss import batch_loss


@pytest.fixture
def batch(tokenizer, records):
    samples = encode_records(tokenizer, records[:3], 400, 1)
    return Collator(tokenizer.eos_token_id)([samples[index] for index in range(3)])


def test_cross_entropy_equals_transformers(batch):
    model = tiny_llama()
    tokens = (batch["labels"][:, 1:] != -100).sum()
    ours = batch_loss(model, batch, tokens)
    theirs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss
    torch.testing.assert_close(ours, theirs)


def test_distillation_losses(batch):
    student, teacher = tiny_llama(0), tiny_llama(1)
    tokens = (batch["labels"][:, 1:] != -100).sum()
    same = batch_loss(student, batch, tokens, tiny_llama(0))
    assert same.item() == pytest.approx(0, abs=1e-5)
    kl = batch_loss(student, batch, tokens, teacher)
    total = 0.0  # Σ p log(p/q) at each labelled position, written out
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    p, q = (model(**inputs).logits.softmax(-1) for model in (teacher, student))
    for row, column in (batch["labels"][:, 1:] != -100).nonzero().tolist():
        total += (p[row, column] * (p[row, column] / q[row, column]).log()).sum().item()
    assert kl.item() == pytest.approx(total / tokens.item(), rel=1e-4)
    half = batch_loss(student, batch, tokens, teacher, (0.5, 0.5))
    plain = batch_loss(student, batch, tokens)
    assert half.item() == pytest.approx((kl.item() + plain.item()) / 2, rel=1e-5)


def test_gradient_is_that_of_the_loss_written_out(batch, monkeypatch):
    """Answers and plain text in one batch, each with its own weight, in pieces of a few rows."""
    monkeypatch.setattr("sparsity.sat.loss.CPU_CHUNK", 5 * 512)
    student, teacher = tiny_llama(0), tiny_llama(1)
    batch["plain"][0] = True
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        p = teacher(**inputs).logits.softmax(-1)
    logits = student(**inputs).logits
    expected = torch.zeros(())
    for row, column in (batch["labels"][:, 1:] != -100).nonzero().tolist():
        kl = 0.7 if row == 0 else 0.25
        log_q = logits[row, column].log_softmax(-1)
        divergence = (p[row, column] * (p[row, column].log() - log_q)).sum()
        target = batch["labels"][row, column + 1]
        expected = expected + kl * divergence - (1 - kl) * log_q[target]
    expected.backward()
    gradients = [weight.grad.clone() for weight in student.parameters()]
    student.zero_grad()
    loss = batch_loss(student, batch, 1, teacher, (0.7, 0.25))
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    for weight, gradient in zip(student.parameters(), gradients, strict=True):
        torch.testing.assert_close(weight.grad, gradient, rtol=1e-4, atol=1e-4)


def test_gradients_of_pruned_weights_are_zero(model_dir, state_path, tokenizer):
    model = restore_sparse(load_model(str(model_dir)), state_path)
    ids = torch.arange(2, 30)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    for name, module in model.named_modules():
        if getattr(module, "_weight_mask", None) is not None:
            gradient = module._parameters["weight"].grad
            assert (gradient[~module._weight_mask] == 0).all(), name
            assert (gradient[module._weight_mask] != 0).any(), name
