"""verify_sparsity.py: what it says of states and safetensors folders, and when it fails."""

import json

import pytest
import torch
from conftest import assert_clear_error, run_inline, run_script
from safetensors.torch import save_file

from sparsity_check import inspect_matrix, is_2_4, kernel_support


def sparse_matrix(rows=32, columns=64, seed=0):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    order = weight.abs().view(rows, -1, 4).argsort(dim=-1)
    mask = torch.ones(rows, columns // 4, 4, dtype=torch.bool).scatter_(2, order[:, :, :2], False)
    return weight.masked_fill(~mask.view(rows, columns), 0)


def test_two_to_four_is_judged_within_groups_of_consecutive_inputs():
    assert is_2_4(torch.tensor([[1.0, 0, 0, 1, 0, 1, 1, 0]]))
    assert not is_2_4(torch.tensor([[0.0, 1, 1, 1, 1, 0, 0, 0]]))  # half zeros, but three values in the first group
    assert not is_2_4(torch.tensor([[0.0, 1, 0, 1, 0, 1]]))  # six inputs do not divide into groups
    assert is_2_4(sparse_matrix()) and not is_2_4(sparse_matrix().t().contiguous())


def test_counts_of_one_matrix():
    weight = sparse_matrix(32, 64).half()
    weight[0][weight[0] == 0] = -0.0
    report = inspect_matrix("a.weight", weight)
    assert (report.shape, report.dtype, report.is_2_4) == ((32, 64), "float16", True)
    assert report.zero_share == 0.5 and report.negative_zeros == 32 and report.under_mask == 0
    mask = weight != 0
    dense = torch.randn(32, 64).half()
    masked = inspect_matrix("a.weight", dense, mask)
    assert masked.is_2_4 and masked.under_mask == 32 * 32 and masked.negative_zeros == 0


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.bfloat16])
def test_other_dtypes(dtype):
    assert inspect_matrix("a.weight", (sparse_matrix() * 50).to(dtype)).is_2_4


def test_kernel_rule_is_that_of_torch():
    assert kernel_support(32, 64, torch.float16) == ("cutlass", "cusparselt")
    assert kernel_support(16, 16, torch.float16) == ("cusparselt",)
    assert kernel_support(4096, 11008, torch.bfloat16) == ("cutlass", "cusparselt")
    assert kernel_support(50257, 768, torch.float16) == ()
    assert kernel_support(32, 32, torch.float32) == ("cutlass",)
    assert kernel_support(64, 64, torch.float64) == ()


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
    assert {name: row["is_2_4"] for name, row in rows.items()} == {
        "layers.0.q_proj.weight": True,
        "layers.0.o_proj.weight": False,
    }
    assert "1 of 2 matrices are 2:4" in result.stdout
    failed = run_script("verify_sparsity.py", folder, "--require", "2:4")
    assert_clear_error(failed, "1 of 2 matrices are not 2:4", "layers.0.o_proj.weight")
    passed = run_inline("verify_sparsity.py", folder, "--require", "2:4", "--exclude", "embed|lm_head|o_proj")
    assert passed.returncode == 0


def test_state(state_path, tmp_path):
    report = tmp_path / "report.json"
    result = run_inline("verify_sparsity.py", state_path, "--require", "2:4", "--output_json", report)
    assert result.returncode == 0, result.stderr
    rows = json.loads(report.read_text())
    assert len(rows) == 14 and all(row["is_2_4"] and row["zero_share"] == 0.5 for row in rows)
    state = torch.load(state_path, weights_only=True)
    state["model_state_dict"]["model.layers.1.mlp.up_proj._weight_mask"][3, :4] = True
    torch.save(state, tmp_path / "broken.pth")
    broken = run_inline("verify_sparsity.py", tmp_path / "broken.pth", "--require", "2:4")
    assert_clear_error(broken, "1 of 14", "model.layers.1.mlp.up_proj.weight")


def test_clear_errors(folder, tmp_path):
    assert_clear_error(run_inline("verify_sparsity.py", tmp_path / "absent"), "nothing found", "absent")
    shard = folder / "model-00002-of-00002.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) - 100])
    assert_clear_error(run_inline("verify_sparsity.py", folder), shard.name, "truncated")
    shard.unlink()
    assert_clear_error(run_inline("verify_sparsity.py", folder), "lacks the shard", shard.name)
    (tmp_path / "empty").mkdir()
    assert_clear_error(run_inline("verify_sparsity.py", tmp_path / "empty"), "no .safetensors files")
