"""The small files of an exported folder."""

from __future__ import annotations

import json

import pytest
from conftest import tiny_llama

from sparsity.export.companions import write_companions


@pytest.mark.parametrize("scaling", [{}, {"rope_type": "linear", "factor": 2.0}])
def test_settings_of_either_transformers_generation_are_understood_by_both(tmp_path, scaling):
    rope = {"rope_theta": 500000.0, "rope_type": "default", **scaling}
    source = {"model_type": "llama", "dtype": "float32", "rope_parameters": rope, "sparsity_config": {"x": 1}}
    (tmp_path / "source").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "source" / "config.json").write_text(json.dumps({**source, "_name_or_path": str(tmp_path)}))
    (tmp_path / "source" / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')
    (tmp_path / "source" / "LICENSE").write_text("do as you like")
    (tmp_path / "source" / "optimizer.pt").write_text("not part of a model")
    write_companions(tmp_path / "source", tiny_llama().config, "float16", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "float16" and config["rope_theta"] == 500000.0 and config["rope_parameters"] == rope
    assert config.get("rope_scaling", {}) == scaling
    assert not {"sparsity_config", "_name_or_path"} & config.keys()
    tokenizer = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["LICENSE", "config.json", "generation_config.json", "tokenizer_config.json"]
