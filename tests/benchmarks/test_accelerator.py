"""The benchmark of an accelerator, at a size for a CPU."""

import pytest

from benchmarks import accelerator
from benchmarks.help_speed import Shape
from lmboost.models.model_config import ModelConfig


@pytest.mark.slow
def test_a_table(monkeypatch, tmp_path):
    model = ModelConfig(vocab_size=64, num_layers=1, d_model=16, num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=32)
    monkeypatch.setattr(accelerator, "SHAPES", {"tiny": Shape(model, model, 8, 16, 2)})
    monkeypatch.setattr(accelerator, "LOSSES", ((16, 8, 64, 32),))
    accelerator.main(2, "tiny", str(tmp_path / "table.md"))
    rows = [line.strip("| ").split(" | ") for line in (tmp_path / "table.md").read_text().splitlines() if "|" in line]
    assert [row[0] for row in rows] == [
        "help",
        "---|---|---|---|---",
        "plain",
        "kd",
        "align",
        "width",
        "---|---|---|---|---|---",
        "16",
    ]
    plain, kd, align = rows[2:5]
    assert plain[3:] == ["1.000", "1.000"] and float(kd[4]) > float(align[4]) > 1
    assert all(float(row[1].replace(",", "")) > 0 for row in (plain, kd, align)) and float(rows[7][4]) > 0
