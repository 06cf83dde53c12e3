"""Progress of long work: what is shown on a terminal, in a notebook and elsewhere, and what trackers are sent."""

import io
import json
import math
import subprocess
import sys
import threading
import time
import types

import pytest
import timm
import torch
from torch.utils.data import TensorDataset

from vitrim.run import track
from vitrim.run.pipeline import compress
from vitrim.run.track import Tracked, check_trackers, names_of
from vitrim.words import progress as shown
from vitrim.words.errors import RecipeError
from vitrim.words.progress import Work, counted, progress, quiet, tell

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}


class Stream(io.StringIO):
    """An error stream that says whether it is a terminal."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


class Caught:
    """What has been printed on the error stream, which is no terminal."""

    def __init__(self, capsys) -> None:
        self.capsys, self.text = capsys, ""

    def getvalue(self) -> str:
        self.text += self.capsys.readouterr().err
        return self.text


@pytest.fixture
def stream(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    return Caught(capsys)


def until(condition, seconds=20):
    end = time.perf_counter() + seconds
    while not condition() and time.perf_counter() < end:
        time.sleep(0.005)
    assert condition()


class TestLines:
    def test_a_line_comes_without_any_step(self, stream, monkeypatch):
        monkeypatch.setattr(shown, "EVERY", 0.02)
        with progress("train", 2400) as advance:
            advance(120, loss=1.2341)
            until(lambda: stream.getvalue().count("\n") >= 2)
        line = stream.getvalue().splitlines()[0]
        assert line.startswith("train 120 of 2,400 (5 %), loss 1.234, ")
        assert line.endswith(" left")
        assert [each.name for each in threading.enumerate() if each.name == "vitrim-progress"] == []

    def test_nested_work_is_one_line(self, stream, monkeypatch):
        monkeypatch.setattr(shown, "EVERY", 0.02)
        with progress("policies", 100) as outer, progress("evaluate", 0) as inner:
            outer(3)
            inner(7)
            until(lambda: "\n" in stream.getvalue())
        assert "; evaluate 7\n" in stream.getvalue()

    def test_no_thread_runs_while_something_is_timed(self, stream, monkeypatch):
        with progress("timing", 5, refresh=False) as advance:
            assert "vitrim-progress" not in [each.name for each in threading.enumerate()]
            advance(1)
            assert stream.getvalue() == ""
            monkeypatch.setattr(shown, "EVERY", 0.0)
            advance(1)
        assert stream.getvalue().startswith("timing 2 of 5 (40 %)")

    def test_short_work_prints_nothing(self, stream):
        with progress("short", 3) as advance:
            assert list(counted("abc", advance)) == ["a", "b", "c"]
            assert advance.done == 3
        assert stream.getvalue() == ""

    def test_only_the_first_process_prints(self, stream, monkeypatch):
        monkeypatch.setattr(shown, "EVERY", 0.0)
        monkeypatch.setenv("RANK", "1")
        with progress("timing", 5, refresh=False) as advance:
            advance(1)
        tell("a stage")
        assert stream.getvalue() == ""

    def test_quiet_hides_lines_and_stages(self, stream, monkeypatch):
        monkeypatch.setattr(shown, "EVERY", 0.0)
        with quiet(), progress("timing", 5, refresh=False) as advance:
            advance(1)
            tell("a stage")
        assert stream.getvalue() == ""
        tell("a stage")
        assert stream.getvalue() == "a stage\n"

    def test_work_in_another_thread_is_not_shown(self, stream):
        seen = []

        def work():
            with progress("elsewhere", 2):
                seen.append(shown._view)

        with progress("here", 1):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
            assert [each.title for each in shown._open] == ["here"]
        assert seen != [None]


def test_the_time_left_counts_only_the_steps_of_this_process(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(shown.time, "perf_counter", lambda: clock[0])
    work = Work("train", 100)
    assert work.left is None
    work.resume(50)
    clock[0] = 10.0
    work(10)
    assert work.left == pytest.approx(40.0)
    assert work.line() == "train 60 of 100 (60 %), 40 s left"
    assert [shown.spoken(s) for s in (3.4, 840, 12_000)] == ["3 s", "14 min", "3 h 20 min"]


def test_a_terminal_has_bars_that_vanish(monkeypatch):
    stream = Stream(terminal=True)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    with progress("[train]", 10) as outer, progress("evaluate", 4, refresh=False) as inner:
        outer(5, loss=0.5)
        inner(1)
    text = stream.getvalue()
    assert "[train]" in text
    assert "evaluate" in text
    assert "50%" in text
    assert shown._view is None


def test_a_notebook_has_html_bars(monkeypatch):
    drawn = []
    handle = types.SimpleNamespace(update=lambda html: drawn.append(html))
    display = types.SimpleNamespace(HTML=str, display=lambda html, display_id: drawn.append(html) or handle)
    ipython = types.SimpleNamespace(get_ipython=lambda: types.SimpleNamespace(kernel=1), display=display)
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setattr(shown, "_DRAWN", 0.0)
    with progress("<train>", 10) as advance:
        advance(5)
    assert drawn[0] == '<progress value="0" max="10"></progress> &lt;train&gt; 0 of 10 (0 %)'
    assert drawn[1].startswith('<progress value="5" max="10"></progress> &lt;train&gt; 5 of 10 (50 %), ')
    assert drawn[2] == ""


def test_neither_rich_nor_ipython_is_imported_for_lines():
    code = (
        "import sys; from vitrim.words.progress import progress\n"
        "with progress('a', 1) as advance: advance(1)\n"
        "sys.exit(bool({'rich', 'IPython', 'torch'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, stderr=subprocess.DEVNULL).returncode == 0


class TestTrackers:
    def test_names_and_what_is_refused(self, tmp_path, monkeypatch):
        assert names_of("wandb, tensorboard,wandb") == ("wandb", "tensorboard")
        assert names_of(None) == names_of(()) == ()
        with pytest.raises(
            RecipeError, match="must be one of tensorboard, wandb, trackio, but got 'tensorbord'; did you"
        ):
            check_trackers(["tensorbord"], tmp_path)
        monkeypatch.setattr(track.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(RecipeError, match=r"wandb must be installed .* pip install 'vitrim\[wandb\]'"):
            check_trackers(["wandb"], tmp_path)
        with pytest.raises(RecipeError, match="trackio must be installed"):
            compress(timm.create_model("test_vit", **TINY), method="magnitude", track="trackio")

    def test_steps_are_counted_on_from_stage_to_stage(self):
        sent = []
        tracked = Tracked(types.SimpleNamespace(log=lambda values, step: sent.append((step, values))))
        for stage, step in (("search", 10), ("search", 20), ("train", 5), ("train", 3)):
            tracked.record({"stage": stage, "event": "step", "step": step, "loss": 1.0, "epoch": 1})
        tracked.record({"stage": "train", "event": "epoch", "step": 6, "top1": 50.0})
        tracked.trials([{"trial": 0, "score": 70.0, "macs": 5, "heads": [1], "best": True}])
        tracked.measured({"top1": 71.0, "method": "random", "warnings": None})
        steps = [step for step, _ in sent]
        assert steps == sorted(steps) == [10, 20, 25, 25, 26, 27, 27, 27]
        assert sent[0][1] == {"search/loss": 1.0}
        assert sent[4][1] == {"train/epoch/top1": 50.0}
        assert sent[5][1] == {"trials/score": 70.0, "trials/macs": 5}
        assert sent[6][1] == {"result/top1": 71.0}
        assert "| top-1 |" in sent[7][1]["result/table"]

    def test_without_trackers_nothing_changes(self):
        tracked = Tracked(None)
        assert tracked.logging(None) is None
        assert tracked.logging(print) is print
        tracked.trials([{"score": 1.0}])

    def test_tensorboard_has_recipe_losses_trials_and_table(self, tmp_path):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        model = timm.create_model("test_vit", **TINY)
        images = TensorDataset(torch.rand(16, 3, 32, 32), torch.arange(16) % 10)
        result = compress(
            model, images, method="random", budget="macs=0.6", epochs=1, train={"batch": 8, "log_every": 1},
            measure={"latency": False}, out=tmp_path / "run", track="tensorboard", verbose=False,
            recipe={"device": "cpu", "data": {"calibration": 8}},
        )  # fmt: skip
        places = {path.parent for path in (tmp_path / "run" / "vitrim").rglob("events.*")}
        found, told = {}, {}
        for place in places:
            events = EventAccumulator(str(place), size_guidance={"tensors": 0})
            events.Reload()
            found |= {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
            told |= {name: events.Tensors(name) for name in events.Tags()["tensors"]}
        log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in log if line["event"] == "step"]
        assert found["train/loss"] == pytest.approx(losses, rel=1e-6)
        assert len(losses) == 2
        assert found["trials/macs"] == [result.measured["macs"]]
        assert math.isclose(found["result/macs_ratio"][0], result.measured["macs_ratio"], rel_tol=1e-6)
        assert b"multiply-accumulates" in told["result/table/text_summary"][0].tensor_proto.string_val[0]
        config = next((tmp_path / "run" / "vitrim").rglob("hparams.yml")).read_text()
        assert "method.name: random" in config
        assert "train.epochs: 1" in config
