"""hf_pts.py as a user runs it: the state it leaves, resume after a kill, wrong inputs; and the layer walk behind it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, TEXTS, assert_clear_error, run_inline, run_script, tiny_llama
from transformers import AutoConfig, AutoModelForCausalLM

from calibration import TOKENS_AT_ONCE, Scratch, Statistics, collect_residual
from checkpoint import LayerStore
from decoder import Delivery, Stream, decoder_layers, shared_inputs
from layerwise import QUALITY, Recipe, prune_layer, prune_model
from model_io import load_state, sparse_masks

RESTORE = """
import sys, torch
import modelopt.torch.opt as mto
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
model = mto.restore(model, sys.argv[2]).eval()
torch.save(model(torch.arange(20)[None]).logits.detach(), sys.argv[3])
"""


@pytest.fixture(scope="module")
def calib(tmp_path_factory):
    path = tmp_path_factory.mktemp("calib") / "calib text.txt"
    path.write_text("\n".join(TEXTS * 12))
    return path


def command(model_dir, calib, output_dir, *more):
    return [
        *("hf_pts.py", "--model_name_or_path", model_dir, "--calib_data", calib, "--output_dir", output_dir),
        *("--device", "cpu", "--dtype", "fp32", "--calib_size", 12, "--model_max_length", 48, "--batch_size", 5, *more),
    ]


@pytest.fixture(scope="module")
def pruned(tmp_path_factory, model_dir, calib):
    output = tmp_path_factory.mktemp("pts") / "saved model"
    return output, run_script(*command(model_dir, calib, output, "--quality", "best"), check=True).stdout


def test_plain_modelopt_restores_the_pruned_model_in_a_fresh_process(pruned, model_dir, tmp_path):
    output, _ = pruned
    arguments = [str(model_dir), str(output / "pts_modelopt_state.pth"), str(tmp_path / "logits.pt")]
    subprocess.run([sys.executable, "-c", RESTORE, *arguments], check=True, cwd=tmp_path)
    logits = torch.load(tmp_path / "logits.pt", weights_only=True)
    model = tiny_llama()
    weights = {n: t for n, t in load_state(arguments[1])["model_state_dict"].items() if not n.endswith("_weight_mask")}
    model.load_state_dict(weights)
    torch.testing.assert_close(logits, model(torch.arange(20)[None]).logits, rtol=0, atol=0)


def test_state_is_exactly_two_of_four_and_the_rest_is_dense(pruned):
    state = load_state(pruned[0] / "pts_modelopt_state.pth")["model_state_dict"]
    masks = list(sparse_masks(state))
    assert len(masks) == 14
    for _, weight, mask in masks:
        assert bool((mask.view(-1, 4).sum(1) == 2).all())
        assert bool((weight[~mask] == 0).all())
        assert not bool(torch.signbit(weight[~mask]).any())
    dense = tiny_llama().state_dict()
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(state[name], dense[name])


def test_log_has_a_row_for_every_pruned_weight_and_the_screen_says_what_was_done(pruned):
    output, stdout = pruned
    rows = [json.loads(line) for line in (output / "pts_layers.jsonl").read_text().splitlines()]
    assert len(rows) == 14
    assert all(row["sparsity"] == 0.5 and 0 < row["relative_error"] < 1 and row["percdamp"] == 0.1 for row in rows)
    assert "50.00%" in stdout
    assert "identical logits" in stdout
    assert sorted(path.name for path in output.glob("[!.]*")) == ["pts_layers.jsonl", "pts_modelopt_state.pth"]


@pytest.mark.parametrize("after", [0, 1])
def test_killed_run_goes_on_and_ends_with_the_same_bits(pruned, model_dir, calib, tmp_path, after):
    arguments = [str(item) for item in command(model_dir, calib, tmp_path, "--quality", "best")]
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    finished = tmp_path / "pts_resume" / f"layer_{after:04d}.safetensors"
    while process.poll() is None and not finished.exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert finished.exists()
    assert not (tmp_path / "pts_modelopt_state.pth").exists()
    run_script(*arguments, check=True)
    assert states_equal(tmp_path, pruned[0])


def states_equal(left, right) -> bool:
    one, other = (load_state(folder / "pts_modelopt_state.pth")["model_state_dict"] for folder in (left, right))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_hidden_states_on_disk_change_no_bit_and_leave_no_file(pruned, model_dir, calib, tmp_path):
    folder = tmp_path / "hidden states"
    more = ["--quality", "best", "--activations_dir", folder]
    run_script(*command(model_dir, calib, tmp_path / "out", *more), check=True)
    assert states_equal(tmp_path / "out", pruned[0])
    assert not list(folder.iterdir())


def test_next_layer_is_read_while_one_is_at_work(monkeypatch):
    """The part of it that needs no GPU: every layer arrives with its own weights, in pinned memory but the first."""
    layers, pinned = tiny_llama(layers=3).model.layers, set()
    before = [{name: weight.clone() for name, weight in layer.named_parameters()} for layer in layers]
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.add(self.data_ptr()) or self.clone())
    delivery = Delivery(layers, torch.device("cpu"))
    delivery.reader = ThreadPoolExecutor(1)
    pointers = [{weight.data_ptr() for weight in layer.parameters()} for layer in layers]
    for index in range(3):
        layer = delivery.bring(index)
        assert all(torch.equal(weight, before[index][name]) for name, weight in layer.named_parameters())
    assert pinned == pointers[1] | pointers[2]


def test_two_processes_save_one_state_and_tell_a_mistake_once(model_dir, calib, tmp_path):
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2"]
    run_script(*launch, *command(model_dir, calib, tmp_path / "out", "--batch_size", 1), check=True)
    masks = list(sparse_masks(load_state(tmp_path / "out" / "pts_modelopt_state.pth")["model_state_dict"]))
    assert len(masks) == 14
    for change in (["--calib_data", "missing.txt"], ["--batch_size", 12]):
        result = run_script(*launch, *command(model_dir, calib, tmp_path / "no", *change))
        assert result.returncode != 0
        assert result.stderr.count("error: ") == 1, result.stderr


def test_dry_run_prints_shapes_and_memory_and_writes_no_state(model_dir, calib, tmp_path):
    result = run_script(*command(model_dir, calib, tmp_path, "--dry_run"), check=True)
    assert "mlp.gate_proj (64, 32), mlp.up_proj (64, 32)" in result.stdout
    assert "computed peak memory" in result.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("choice", "group", "kept"),
    [
        (["--pattern", "4:8"], 8, 4),
        (["--pattern", "unstructured:0.5"], None, None),
        (["--sparsity_fmt", "wanda"], 4, 2),
        (["--sparsity_fmt", "sparse_magnitude"], 4, 2),
        (["--quality", "fast", "--ignore", "*.down_proj"], 4, 2),
    ],
)
def test_other_choices_leave_a_state_that_restores(model_dir, calib, tmp_path, choice, group, kept):
    result = run_inline(*command(model_dir, calib, tmp_path, *choice))
    assert result.returncode == 0, result.stderr
    assert "identical logits" in result.stdout
    masks = list(sparse_masks(load_state(tmp_path / "pts_modelopt_state.pth")["model_state_dict"]))
    assert len(masks) == (12 if "--ignore" in choice else 14)
    for _, weight, mask in masks:
        assert not weight[~mask].any()
        if group:
            assert bool((mask.view(-1, group).sum(1) == kept).all())
    # Without groups, layers that share an input share their quota as well: the whole is exact, the parts are not.
    kept_weights = sum(int(mask.sum()) for _, _, mask in masks)
    assert kept_weights / sum(mask.numel() for _, _, mask in masks) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("change", "needles"),
    [
        (["--model_name_or_path", "no/such/model"], ["no/such/model"]),
        (["--calib_data", "missing.txt"], ["missing.txt"]),
        (["--device", "cuda"], ["--device cuda", "cpu"]),
        (["--pattern", "3:3"], ["--pattern", "3:3"]),
        (["--calib_size", "0"], ["--calib_size", "0"]),
        (["--model_max_length", "100000"], ["100000", "1024 positions"]),
        (["--inference_tensor_parallel", "2"], ["--inference_tensor_parallel"]),
        (["--ignore", "*.no_such"], ["--ignore", "*.no_such"]),
        (["--percdamp", "-1"], ["--percdamp", "-1"]),
        (["--percdamp", "0.1", "--sparsity_fmt", "wanda"], ["--percdamp", "wanda"]),
        (["--activations_dir", "setup_env.sh"], ["setup_env.sh"]),
    ],
)
def test_wrong_input_gets_one_clear_line(model_dir, calib, tmp_path, change, needles):
    assert_clear_error(run_inline(*command(model_dir, calib, tmp_path / "out", *change)), *needles)


def test_encoder_and_conv1d_models_are_refused(calib, tmp_path, tokenizer):
    from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertForMaskedLM(BertConfig(vocab_size=400, **small)).save_pretrained(tmp_path / "bert")
    GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=32, n_layer=1, n_head=2)).save_pretrained(tmp_path / "gpt2")
    for name, needle in (("bert", "BertForMaskedLM"), ("gpt2", "Conv1D")):
        tokenizer.save_pretrained(tmp_path / name)
        assert_clear_error(run_inline(*command(tmp_path / name, calib, tmp_path / "out")), needle)


def calibration(vocab: int = 400, batches: int = 3):
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, vocab, (2, 24), generator=generator)} for _ in range(batches)]


REFITTED = Recipe(refit_iterations=5)


def prune(model, batches=None, recipe=REFITTED, **more):
    return prune_model(model, batches or calibration(), recipe, torch.device("cpu"), LayerStore(None, ""), **more)


def test_linears_that_read_one_tensor_share_a_hessian():
    model = tiny_llama(layers=1)
    names = [
        f"model.layers.0.{n}"
        for n in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    ]
    assert [sorted(group) for group in shared_inputs(model, set(names))[0]] == [
        sorted(names[:2]),
        sorted(names[2:4]),
        names[4:],
    ]


def test_padding_does_not_count():
    plain, padded = tiny_llama(), tiny_llama()
    batches = calibration()
    with_pads = []
    for batch in batches:
        ids = torch.cat([batch["input_ids"], torch.full((2, 8), 7)], dim=1)
        mask = torch.ones_like(ids)
        mask[:, 24:] = 0
        with_pads.append({"input_ids": ids, "attention_mask": mask})
    without_masks = [{"input_ids": batch["input_ids"]} for batch in with_pads]
    counted = tiny_llama()
    masks, same, other = prune(plain, batches), prune(padded, with_pads), prune(counted, without_masks)
    agreement, disagreement = agree(masks, same), agree(masks, other)
    assert agreement > 0.97 > disagreement


def agree(left: dict, right: dict) -> float:
    """Share of mask entries that are the same; rounding may tip a choice between nearly equal weights."""
    return sum(int((left[n] == right[n]).sum()) for n in left) / sum(mask.numel() for mask in left.values())


def test_ignored_layers_stay_dense_and_every_other_is_pruned():
    model, dense = tiny_llama(), tiny_llama()
    masks = prune(model, ignore=["*.0.mlp.*"])
    assert len(masks) == 11
    for name, parameter in model.named_parameters():
        untouched = torch.equal(parameter, dense.get_parameter(name))
        assert untouched == (name.removesuffix(".weight") not in masks), name


@pytest.mark.parametrize("quality", QUALITY)
def test_more_effort_brings_the_output_nearer_to_the_dense_model(quality):
    batches = calibration(batches=12)
    dense, plain, ours = tiny_llama(), tiny_llama(), tiny_llama()
    prune(plain, batches, Recipe())
    prune(ours, batches, QUALITY[quality])
    ids = torch.cat([batch["input_ids"] for batch in batches])
    with torch.no_grad():
        target = dense(ids).logits
        assert (ours(ids).logits - target).square().mean() < (plain(ids).logits - target).square().mean()


def test_nan_weight_is_named():
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(Exception, match=r"model\.layers\.1\.mlp\.up_proj"):
        prune(model)


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


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architecture(architecture):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config(architecture)).eval()
    masks = prune(model)
    assert masks.keys() == linears(model)
    for name, mask in masks.items():
        assert bool((mask.view(-1, 4).sum(1) == 2).all())
        assert bool((model.get_submodule(name).weight[~mask] == 0).all())


@pytest.mark.parametrize(("architecture", "adds"), [("llama", True), ("opt", True), ("gemma2", False)])
def test_residual_target_is_used_only_where_the_last_linear_adds_to_the_output(architecture, adds):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config(architecture)).eval()
    prefix, layers = decoder_layers(model)
    stream = Stream(model, layers, calibration(), torch.device("cpu"))
    name = shared_inputs(model, {f"{prefix}.0.{last}" for last in ("fc2", "mlp.down_proj")} & linears(model))[0][0][0]
    statistics = collect_residual(stream, layers[0], 0, name, model.get_submodule(name), list(stream.hidden))
    assert (statistics is not None) == adds


@pytest.mark.parametrize("quality", QUALITY)
def test_stream_behind_a_layer_is_the_pruned_layers_own_output_to_the_bit(quality):
    """What a resumed run computes again must be what the interrupted run had."""
    model, recipe = tiny_llama(), QUALITY[quality]
    _, layers = decoder_layers(model)
    stream = Stream(model, layers, calibration(), torch.device("cpu"))
    before = [hidden.clone() for hidden in stream.hidden]
    groups = [{n: model.get_submodule(n) for n in names} for names in shared_inputs(model, linears(model))[0]]
    targets = [hidden.clone() for hidden in before]
    stream.advance(layers[0], 0, targets)
    with torch.no_grad():
        prune_layer(stream, layers[0], 0, groups, [], targets, replace(recipe, dense_inputs=False))
        stream.advance(layers[0], 0, before)
    assert all(torch.equal(left, right) for left, right in zip(stream.hidden, before, strict=True))


@pytest.mark.parametrize("cols", [8, TOKENS_AT_ONCE])
def test_statistics_that_share_memory_for_products_are_those_of_all_tokens(cols):
    generator, scratch = torch.Generator().manual_seed(0), Scratch(torch.device("cpu"))
    inputs, wanted = (torch.randn(2, TOKENS_AT_ONCE + 500, n, generator=generator) for n in (cols, 4))
    found = [Statistics(cols, scratch, rows=4) for _ in inputs]
    for part in (slice(0, 300), slice(300, None)):  # the second is more than is taken in at once
        for statistics, given, target in zip(found, inputs, wanted, strict=True):
            statistics.add(given[part], target[part])
    for statistics, given, target in zip(found, inputs, wanted, strict=True):
        statistics.finish("a linear")
        torch.testing.assert_close(statistics.hessian, given.t() @ given / len(given), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(statistics.cross, target.t() @ given / len(given), rtol=1e-4, atol=1e-4)


WORKER = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
import torch, torch.distributed as dist
from conftest import tiny_llama
from test_hf_pts import calibration, prune
rank = int(sys.argv[3])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2] + "/meet", rank=rank, world_size=2)
model = tiny_llama()
masks = prune(model, calibration(batches=4)[rank::2])
if rank == 0:
    torch.save([model.state_dict(), masks], sys.argv[2] + "/result.pt")
"""


def test_two_processes_with_half_the_calibration_each_prune_as_one_with_all(tmp_path):
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(ROOT), str(tmp_path), str(rank)], env=dict(os.environ))
        for rank in range(2)
    ]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    state, masks = torch.load(tmp_path / "result.pt", weights_only=True)
    alone = tiny_llama()
    own_masks = prune(alone, calibration(batches=4))
    assert agree(masks, own_masks) > 0.999
    for name, parameter in alone.named_parameters():
        assert (parameter - state[name]).abs().mean() < 1e-3, name
