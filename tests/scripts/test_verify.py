"""verify_sparsity.py: what it says of states and safetensors folders, and when it fails."""

import json

import pytest
import torch
from conftest import assert_clear_error, run_inline, run_script, sparse_matrix
from safetensors.torch import save_file


@pytest.fixture
def folder(tmp_path):
    """A folder of two shards: one 2:4 matrix and one dense, beside an embedding, a norm and a head."""
    save_file(
        {"model.embed_tokens.weight": torch.ones(8, 4), "layers.0.q_proj.weight": sparse_matrix()}, tmp_path / "a"
    )
    save_file(
        {
            "layers.0.o_proj.weight": torch.ones(16, 16),
            "norm.weight": torch.ones(16),
            "lm_head.weight": torch.ones(8, 4),
        },
        tmp_path / "b",
    )
    index = {"weight_map": {}}
    for number, part in enumerate("ab", start=1):
        name = f"model-0000{number}-of-00002.safetensors"
        (tmp_path / part).rename(tmp_path / name)
        index["weight_map"][part] = name
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def test_folder_table_and_requirement(folder):
    report = folder / "report.json"
    result = run_inline("verify_sparsity.py", folder, "--output_json", report)
    assert result.returncode == 0
    rows = {row["name"]: row for row in json.loads(report.read_text())}
    assert {name: row["fits"] for name, row in rows.items()} == {
        "layers.0.q_proj.weight": True,
        "layers.0.o_proj.weight": False,
    }
    assert "1 of 2 matrices are 2:4" in result.stdout
    failed = run_script("verify_sparsity.py", folder, "--require", "2:4")
    assert_clear_error(failed, "1 of 2 matrices are not 2:4", "layers.0.o_proj.weight")
    passed = run_inline("verify_sparsity.py", folder, "--require", "2:4", "--exclude", "embed|lm_head|o_proj")
    assert passed.returncode == 0


def test_a_state_is_compared_with_the_required_pattern(state_path):
    assert_clear_error(run_inline("verify_sparsity.py", state_path, "--require", "1:4"), "14 of 14", "not 1:4")
    assert run_inline("verify_sparsity.py", state_path, "--require", "4:8").returncode == 0  # 2:4 is 4:8 too


def test_state(state_path, tmp_path):
    report = tmp_path / "report.json"
    result = run_inline("verify_sparsity.py", state_path, "--require", "2:4", "--output_json", report)
    assert result.returncode == 0, result.stderr
    rows = json.loads(report.read_text())
    assert len(rows) == 14 and all(row["fits"] and row["zero_share"] == 0.5 for row in rows)
    state = torch.load(state_path, weights_only=True)
    state["model_state_dict"]["model.layers.1.mlp.up_proj._weight_mask"][3, :4] = True
    torch.save(state, tmp_path / "broken.pth")
    broken = run_inline("verify_sparsity.py", tmp_path / "broken.pth", "--require", "2:4")
    assert_clear_error(broken, "1 of 14", "model.layers.1.mlp.up_proj.weight")


def test_clear_errors(folder, tmp_path):
    assert_clear_error(run_inline("verify_sparsity.py", tmp_path / "absent"), "does not exist", "absent")
    shard = folder / "model-00002-of-00002.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) - 100])
    assert_clear_error(run_inline("verify_sparsity.py", folder), shard.name, "truncated")
    shard.unlink()
    assert_clear_error(run_inline("verify_sparsity.py", folder), shard.name, "is missing")
    save_file({"layers.0.q_proj.weight": torch.ones(8, 4, dtype=torch.uint8)}, tmp_path / "packed.safetensors")
    assert_clear_error(run_inline("verify_sparsity.py", tmp_path / "packed.safetensors"), "q_proj.weight is packed")
    (tmp_path / "empty").mkdir()
    assert_clear_error(run_inline("verify_sparsity.py", tmp_path / "empty"), "no .safetensors files")
