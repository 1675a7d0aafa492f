"""Ten kills at random moments, over all scripts of one process: no run is lost, none differs, nothing is left over."""

from __future__ import annotations

import pytest
import torch

from benchmarks import chaos


@pytest.mark.slow
def test_no_kill_loses_a_run():
    names = [name for name in chaos.JOBS if name != "SAT, two processes"]  # takes minutes on one core
    outcomes = dict(chaos.run_chaos(2, names, seed=0))
    assert sum(outcome.kills for outcome in outcomes.values()) >= 10
    for name, outcome in outcomes.items():
        assert not outcome.lost + outcome.different + outcome.left_over, name


@pytest.mark.parametrize("change, expected", [(0.0, False), (1e-6, False), (1e-3, True)])
def test_a_difference_of_weights_is_seen(tmp_path, change, expected):
    from safetensors.torch import save_file

    for name, offset in (("a", 0.0), ("b", change)):
        save_file({"w": torch.ones(4) + offset}, tmp_path / f"{name}.safetensors")
    assert chaos.differs(tmp_path / "a.safetensors", tmp_path / "b.safetensors", 1e-5) is expected
    if change:
        assert chaos.differs(tmp_path / "a.safetensors", tmp_path / "b.safetensors", 0.0)


def test_times_do_not_count_as_a_difference(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"step": 1, "seconds": 3}\n')
    (tmp_path / "b.jsonl").write_text('{"step": 1, "seconds": 4}\n')
    (tmp_path / "c.jsonl").write_text('{"step": 2, "seconds": 3}\n')
    assert not chaos.differs(tmp_path / "a.jsonl", tmp_path / "b.jsonl", 0.0)
    assert chaos.differs(tmp_path / "a.jsonl", tmp_path / "c.jsonl", 0.0)
