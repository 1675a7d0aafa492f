"""The whole pipeline on small random models of many families: prune, train two steps, evaluate, export, verify."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import TEXTS
from forked import run_forked

from benchmarks.tiny_models import tiny_model

# Settings of a tiny model, and the kind of tokenizer it comes with.
FAMILIES = {
    "llama": ({}, "unigram"),
    "mistral": ({}, "unigram"),  # sliding windows
    "qwen2": ({"tie_word_embeddings": True}, "bpe"),
    "gemma3_text": ({}, "unigram"),
    "gemma4_text": ({}, "bpe"),  # heads of another width in every other layer
    "phi3": ({}, "unigram"),  # fused weights
    "opt": ({}, "bpe"),
    "gpt_neox": ({}, "bpe"),
    "bloom": ({}, "bpe"),  # ALiBi
    "bamba": ({}, "bpe"),  # attention and state space; layers return tuples
    "mixtral": ({}, "bpe"),  # experts
}


@pytest.fixture(scope="module")
def tokenizers_by_kind(tokenizer):
    """Byte-level BPE, and a unigram model with the white space marks of SentencePiece."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.Unigram())
    core.normalizer = normalizers.NFKC()
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=390, special_tokens=["<s>", "</s>", "<unk>"], unk_token="<unk>")
    core.train_from_iterator(TEXTS, trainer)
    unigram = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return {"bpe": tokenizer, "unigram": unigram}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_pipeline(family, tokenizers_by_kind, data_dir, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings, kind = FAMILIES[family]
    model, tokenizer = tmp_path / "model", tokenizers_by_kind[kind]
    dense = tiny_model(family, **settings)
    # Some random models only ever generate blanks, special or unknown tokens, which eval.py rightly refuses to score.
    size = dense.get_input_embeddings().weight.shape[0]
    blank = [n for n in range(size) if not tokenizer.decode([n], skip_special_tokens=True).strip()]
    dense.generation_config.suppress_tokens = blank
    dense.save_pretrained(model)
    tokenizer.save_pretrained(model)
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS * 3))
    pts, sat = tmp_path / "pts" / "pts_modelopt_state.pth", tmp_path / "sat" / "finetuned_modelopt_state.pth"

    def run(script, *arguments):
        result = run_forked(script, *arguments)
        assert result.returncode == 0, f"{script}: {result.stderr[-3000:]}"
        return result.stdout

    calibration = ("--calib_data", tmp_path / "texts.json", "--calib_size", 4, "--model_max_length", 32)
    run("hf_pts.py", "--model_name_or_path", model, "--dtype", "fp32", *calibration, "--output_dir", pts.parent)
    training = ("--data_path", data_dir, "--max_length", 200, "--max_steps", 2, "--train_bs", 2)
    run("finetune.py", "--model", model, "--restore_path", pts, *training, "--output_dir", sat.parent)
    generation = ("--limit", 3, "--beam_size", 2, "--batch_size", 2, "--model_max_length", 200)
    lengths = ("--max_new_tokens", 24, "--min_new_tokens", 12)
    evaluated = ("--model_dir", model, "--modelopt_restore_path", sat)
    output = run("eval.py", *evaluated, "--data_path", data_dir / "cnn_eval.json", *generation, *lengths)
    assert output.splitlines()[-1].startswith("ROUGE scores: {'rouge1': ")
    run("export_hf.py", *evaluated, "--output_dir", tmp_path / "exported")
    run("verify_sparsity.py", tmp_path / "exported", "--require", "2:4")

    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    ids = AutoTokenizer.from_pretrained(tmp_path / "exported")(TEXTS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert exported(ids).logits.isfinite().all()
