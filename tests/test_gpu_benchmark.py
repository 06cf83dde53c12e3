"""The command that measures everything on a GPU, in its tiny form on a CPU."""

import json
import types

import pytest

from benchmarks import gpu


def test_every_part_is_written_as_it_comes(tmp_path, capsys, monkeypatch):
    real, asked = gpu.vitrim.compress, []

    def compress(model, data, **how):
        if how["method"] == "magnitude" and how["budget"] == "macs=0.5":
            return real(model, data, **how)
        # Searches that calibrate and budgets of time take long, and fail on a machine whose times do not repeat.
        asked.append((how["method"], how["budget"], how["device"]))
        return types.SimpleNamespace(measured={"macs_ratio": 0.5, "latency_ratio": 0.49})

    monkeypatch.setattr(gpu.vitrim, "compress", compress)
    gpu.main(["--out", str(tmp_path), "--tiny", "--part", "train", "latency", "calibration", "budget"])
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert not [row for row in rows if "error" in row]
    assert [row["part"] for row in rows if row["part"] != "latency"] == ["machine", "train", "calibration", "budget"]
    assert asked == [("post_training", "macs=0.5", "cpu"), ("magnitude", "latency=0.5", "cpu")]
    timed = [row for row in rows if row["part"] == "latency"]
    assert len(timed) == 9 * 2  # children, forms
    assert {row["child"]: row["macs"] for row in timed}["half the blocks"] == pytest.approx(1 / 3, abs=1e-3)
    assert all(row["ratio"] > 0 for row in timed)
    text = (tmp_path / "table.md").read_text()
    assert text in capsys.readouterr().out
    assert text.count("| optimized |") == text.count("| as stored |") == 9


def test_what_fails_or_has_no_time_is_written_and_the_rest_goes_on(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("no kernel image is available for execution on the device")

    monkeypatch.setattr(gpu.throughput, "compared", broken)
    gpu.main(["--out", str(tmp_path), "--tiny", "--part", "train", "--minutes", "1"])
    assert "no kernel image" in (tmp_path / "table.md").read_text()
    gpu.main(["--out", str(tmp_path), "--tiny", "--part", "train", "latency", "--minutes", "0"])
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert sum("left_out" in json.loads(line) for line in lines) == 1 + 18


def test_without_a_card_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "place_of", lambda _: (_ for _ in ()).throw(gpu.VitrimError("device must be one")))
    with pytest.raises(SystemExit) as end:
        gpu.main(["--out", str(tmp_path)])
    assert end.value.code == 2
    assert "device must be one" in capsys.readouterr().err
