"""export_hf.py: the exported folder is an ordinary checkpoint with the sparse model's own logits."""

import json

import pytest
import torch
from conftest import ROOT, assert_clear_error, run_inline, run_script, tiny_llama


def sparse_state(model, path):
    import modelopt.torch.opt as mto
    import modelopt.torch.sparsity as mts

    model = mts.sparsify(model, "sparse_magnitude")
    mto.save(model, path)
    return path


@pytest.fixture(scope="module")
def restored(model_dir, state_path):
    """The sparse model as modelopt restores it: the truth an export must equal."""
    import modelopt.torch.opt as mto
    from transformers import AutoModelForCausalLM

    return mto.restore(AutoModelForCausalLM.from_pretrained(model_dir), state_path).eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory, model_dir, state_path):
    """An export in several shards, made by a process of its own: (folder, CompletedProcess)."""
    folder = tmp_path_factory.mktemp("export")
    perplexity_json = {"perplexity": 12.345, "dtype": "float32", "protocol": "protocol: x"}
    (folder / "perplexity.json").write_text(json.dumps(perplexity_json))
    rouge = {"rouge1": 43.21, "rouge2": 20.0, "rougeL": 30.0, "rougeLsum": 35.0, "examples": 7}
    (folder / "rouge.json").write_text(json.dumps(rouge))
    command = ["export_hf.py", "--model_dir", model_dir, "--modelopt_restore_path", state_path]
    command += ["--output_dir", folder / "sparse model", "--max_shard_size", "50KB"]
    figures = ["--figures", f"sparse={folder / 'perplexity.json'}", "--figures", f"sparse={folder / 'rouge.json'}"]
    return folder / "sparse model", run_script(*command, *figures, check=True)


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(2, 62).view(2, 30)).logits


def test_plain_transformers_gives_identical_logits(exported, restored):
    script = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype='auto').eval()\n"
        "with torch.no_grad():\n"
        "    torch.save(model(input_ids=torch.arange(2, 62).view(2, 30)).logits, sys.argv[2])\n"
        "assert 'modelopt' not in sys.modules\n"
    )
    target = exported[0].parent / "logits.pt"
    run_script("-c", script, exported[0], target, check=True)
    assert torch.equal(torch.load(target), logits(restored))


def test_folder_is_complete_and_clean(exported, model_dir):
    from safetensors.torch import load_file
    from transformers import AutoTokenizer, GenerationConfig

    folder, result = exported
    names = {path.name for path in folder.iterdir()}
    shards = {name for name in names if name.endswith(".safetensors")}
    assert len(shards) > 1
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == shards
    config = json.loads((folder / "config.json").read_text())
    assert "sparsity_config" not in config and "quantization_config" not in config
    assert {config[key] for key in ("dtype", "torch_dtype") if key in config} == {"float32"}
    assert str(ROOT) not in (folder / "config.json").read_text()
    text = "The river rose, <s> and 3 ships left."
    assert AutoTokenizer.from_pretrained(folder)(text) == AutoTokenizer.from_pretrained(model_dir)(text)
    assert GenerationConfig.from_pretrained(folder).eos_token_id == 1
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o666 & folder.stat().st_mode}
    tensors = {name: tensor for file in shards for name, tensor in load_file(folder / file).items()}
    assert tensors.keys() == index["weight_map"].keys()
    assert not any("mask" in name for name in tensors)
    projections = [tensor for name, tensor in tensors.items() if "_proj" in name]
    assert len(projections) == 14
    for tensor in projections:
        assert ((tensor.view(-1, 4) == 0).sum(dim=1) >= 2).all()
        assert not torch.signbit(tensor[tensor == 0]).any()
    assert "14 of 14 pruned matrices are 2:4" in result.stdout
    assert sorted(path.name for path in folder.parent.iterdir() if path.name.startswith(".")) == []


def test_model_card_shows_the_given_figures_only(exported, model_dir):
    card = (exported[0] / "README.md").read_text()
    assert "| sparse | 12.35 |" in card and "| sparse | 43.21 |" in card
    assert str(model_dir) not in card and "14 matrices" in card


def test_asked_dtype_and_tied_embeddings(tmp_path, tokenizer):
    import modelopt.torch.opt as mto
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    dense = tiny_llama(seed=5)
    dense.config.tie_word_embeddings = True
    type(dense)(dense.config).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    state = sparse_state(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), tmp_path / "state.pth")
    result = run_inline(
        "export_hf.py",
        *("--model_dir", tmp_path / "dense", "--modelopt_restore_path", state),
        *("--output_dir", tmp_path / "out", "--dtype", "bf16"),
    )
    assert result.returncode == 0, result.stderr
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    assert exported.dtype == torch.bfloat16
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    assert torch.equal(logits(exported), logits(mto.restore(dense, state).eval()))


@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
def test_experts_keep_their_checkpoint_names(tmp_path, tokenizer, shard_size):
    """transformers 5 fuses the experts of a mixture in memory; on disk they must stay apart, for all other programs."""
    import modelopt.torch.opt as mto
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    sizes = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    dense = tmp_path / "dense"
    MixtralForCausalLM(MixtralConfig(**sizes, **heads, bos_token_id=0, eos_token_id=1)).save_pretrained(dense)
    tokenizer.save_pretrained(dense)
    state = sparse_state(AutoModelForCausalLM.from_pretrained(dense), tmp_path / "state.pth")
    command = ["export_hf.py", "--model_dir", dense, "--modelopt_restore_path", state, "--max_shard_size", shard_size]
    result = run_inline(*command, "--output_dir", tmp_path / "out")
    assert result.returncode == 0, result.stderr

    def names(folder):
        return {name for file in folder.glob("*.safetensors") for name in safe_open(file, "pt").keys()}  # noqa: SIM118

    assert names(tmp_path / "out") == names(dense)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    restored = mto.restore(AutoModelForCausalLM.from_pretrained(dense), state).eval()
    assert torch.equal(logits(exported), logits(restored))


def test_an_existing_folder_is_kept_unless_overwriting_succeeds(model_dir, state_path, tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "precious.txt").write_text("mine")
    command = ["export_hf.py", "--model_dir", model_dir, "--modelopt_restore_path", state_path, "--output_dir", target]
    assert_clear_error(run_inline(*command), "exists already", "--overwrite")
    wrong = run_inline(*command, "--overwrite", "--max_shard_size", "big")
    assert_clear_error(wrong, "--max_shard_size big")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "precious.txt"]
    assert run_inline(*command, "--overwrite").returncode == 0
    assert (target / "model.safetensors").is_file() and not (target / "precious.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
