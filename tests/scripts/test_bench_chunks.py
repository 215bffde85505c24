"""The bench of videos drawn chunk by chunk, on a tiny network: which rows there are, and what they hold."""

from __future__ import annotations

import json

import pytest

from scripts import bench_chunks


@pytest.mark.slow
def test_rows_and_record(tmp_path, capsys):
    words = ["--model", "tiny", "--device", "cpu", "--latent-frames", "12", "--turns", "1", "--steps", "2"]
    assert bench_chunks.main([*words, "--ways", "stock;ring;ring in graphs", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "bench_chunks_tiny_12_cpu.json").read_text())
    stock, ring, graphs = record["rows"]
    assert stock["difference"] == 0 and ring["difference"] < 1e-3 and ring["ring_gib"] > 0
    assert all(0 < row["last_chunk"] < row["seconds"] == row["fastest"] == row["slowest"] for row in record["rows"])
    assert ring["evaluations"] == graphs["evaluations"] == 5 * 2 + 1 + 2 + 3 + 3
    assert "12 latent frames of 32x32, K = 2" in capsys.readouterr().out
