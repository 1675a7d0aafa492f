"""Perplexity and the windows of a token stream."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import TEXTS

from sparsity.errors import UserError
from sparsity.evaluation.perplexity import protocol_line, windows_of
from sparsity.sources import Source


def test_windows_start_a_stride_apart_and_all_are_full(tokenizer, tmp_path):
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
    source = Source(str(tmp_path / "texts.json"))
    stream = [id for text in TEXTS for id in (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)]
    windows = windows_of(tokenizer, source, context=20, stride=7, limit=None)
    assert windows.tolist() == [stream[start : start + 20] for start in range(0, len(stream) - 19, 7)]
    assert windows_of(tokenizer, source, context=20, stride=7, limit=3).tolist() == windows[:3].tolist()
    with pytest.raises(UserError, match="less than a window of 9000"):
        windows_of(tokenizer, source, context=9000, stride=9000, limit=None)


def test_protocol_tells_blocks_from_sliding_windows():
    windows = torch.zeros(3, 16)
    assert protocol_line(windows, 16, 45, Source("org/wiki:raw"), "test", "text") == (
        "protocol: org/wiki raw test text; 3 windows of 16 tokens, blocked; 45 tokens predicted"
    )
    assert "sliding by 5" in protocol_line(windows, 5, 25, Source("org/wiki:raw:train"), "test", "text")
