"""A model runs in each runtime with eager PyTorch's logits, and models are timed against one another in turns."""

import functools
import json

import pytest
import torch

from tests.samples import apart, images, random_plan
from tests.tolerance import SINGLE
from vitrim import cli, families
from vitrim.cut import surgery
from vitrim.deploy import bench, export, runtimes, store
from vitrim.families import describe
from vitrim.measure.turns import turns
from vitrim.words.errors import ExportError, RecipeError, RunError
from vitrim.words.plain import load, read_json


@pytest.fixture(scope="module")
def parent():
    torch.manual_seed(0)
    return families.adopt(families.get("vit").example().eval())


@pytest.fixture(scope="module")
def child(parent):
    return surgery.apply(parent, random_plan(describe(parent), 3))


@pytest.fixture(scope="module")
def onnx(child, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "child.onnx"
    export.export(child, path)
    return path


@pytest.mark.parametrize("runtime", [name for name in runtimes.RUNTIMES if name != "cudagraph"])
def test_every_runtime_gives_eagers_logits(runtime, child, onnx, monkeypatch):
    if runtime == "openvino":
        pytest.importorskip("openvino")
    # Traced whole as in earnest, and run without the minute that the C++ compiler takes.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    x = images(describe(child), 3, torch.float32)
    file = onnx if runtime in ("onnxruntime", "openvino") else None
    child.train()
    found = runtimes.ready(child, x, runtime, threads=1, onnx=file)
    assert child.training
    child.eval()
    other = images(describe(child), 3, torch.float32) + 1
    with torch.no_grad():
        assert apart(found.run(other), child(other)) < (SINGLE if runtime == "eager" else export.PARITY)
    assert found.apart < export.PARITY
    assert found.bytes == (runtimes.weights_bytes(child) if file is None else onnx.stat().st_size)
    assert (found.runtime, found.version.split()[0]) == (runtime, runtime if file else "torch")


def test_without_a_file_it_is_exported(parent):
    x = images(describe(parent), 2, torch.float32)
    found = runtimes.ready(parent, x, "onnxruntime")
    with torch.no_grad():
        assert apart(found.run(x), parent(x)) < export.PARITY


def test_a_runtime_that_differs_is_refused(child, onnx, parent):
    x = images(describe(child), 2, torch.float32)
    with pytest.raises(ExportError, match="onnxruntime must give eager's logits"):
        runtimes.ready(parent, x, "onnxruntime", onnx=onnx)


def test_a_runtime_that_is_missing_names_its_extra(child, monkeypatch):
    real = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "openvino" else real(name))
    with pytest.raises(ExportError, match=r"openvino must be installed .* pip install 'vitrim\[openvino\]'"):
        runtimes.ready(child, images(describe(child), 1, torch.float32), "openvino")


@pytest.mark.parametrize(
    ("runtime", "kind", "words"),
    [
        ("onnxruntim", torch.float32, "did you mean 'onnxruntime'"),
        ("tensorrt", torch.float32, "must be one of .*eager, .*openvino, but got 'tensorrt'"),
        ("onnxruntime", torch.float64, "must run on cpu in float32, but got torch.float64"),
    ],
)
def test_wrong_runtimes(runtime, kind, words, child):
    with pytest.raises(ExportError, match=words):
        runtimes.ready(child, images(describe(child), 1, kind), runtime)


def test_a_file_is_run_as_it_is(child, onnx, tmp_path):
    x = images(describe(child), 2, torch.float32)
    found = runtimes.ready(onnx, x, "onnxruntime")
    assert found.apart is None
    with torch.no_grad():
        assert apart(found.run(x), child(x)) < export.PARITY
    with pytest.raises(ExportError, match="must run in onnxruntime or openvino, but eager"):
        runtimes.ready(onnx, x, "eager")
    with pytest.raises(ExportError, match="must exist"):
        runtimes.ready(tmp_path / "no.onnx", x, "onnxruntime")
    (tmp_path / "no.onnx").write_text("not ONNX")
    with pytest.raises(ExportError, match="onnxruntime must be able to read the file"):
        runtimes.ready(tmp_path / "no.onnx", x, "onnxruntime")


def test_turns_go_there_and_back():
    calls = []
    samples, repeats = turns([lambda name=name: calls.append(name) for name in "abc"], seconds=1e-9, runs=2)
    assert [len(mine) for mine in samples] == [2, 2, 2]
    order = "".join(calls)[6:]
    assert repeats == len(order) // 6
    assert order[::repeats] == "abccba"


def test_models_are_timed_in_turns(parent, onnx, tmp_path):
    found = bench.bench(
        {"dense": parent, "file": onnx},
        runtimes=["eager", "onnxruntime"],
        batches=[1, 2],
        threads=1,
        seconds=0.02,
        runs=2,
    )
    told = [(line.batch, line.runtime, line.model) for line in found.lines]
    one = [("eager", "dense"), ("onnxruntime", "dense"), ("onnxruntime", "file")]
    assert told == [(batch, *pair) for batch in (1, 2) for pair in one]
    for line in found.lines:
        assert 0 < line.seconds_low <= line.seconds <= line.seconds_high
        assert line.images_per_second == pytest.approx(line.batch / line.seconds)
        assert (line.ratio == 1) == (line.model == "dense")
        assert line.ratio_low <= line.ratio <= line.ratio_high
        assert (line.macs is None, line.apart is None) == (line.model == "file", line.model == "file")
    assert [line.bytes for line in found.lines[:3]][::2] == [runtimes.weights_bytes(parent), onnx.stat().st_size]
    assert set(found.versions) == {"eager", "onnxruntime"}
    bench.write(found, tmp_path / "new" / "b.json")
    assert load(bench.Bench, read_json(tmp_path / "new" / "b.json")) == found
    svg = (tmp_path / "new" / "b.svg").read_text()
    assert svg.startswith("<?xml")
    assert "var(" not in svg
    assert all(word in svg for word in ("batch of 1", "batch of 2", "dense", "file", "onnxruntime"))
    with pytest.raises(RunError, match=r"must be writable"):
        bench.write(found, tmp_path / "new" / "b.json" / "c.json")


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"batches": [0]}, RecipeError, "batch must be a whole number of at least 1, but got 0"),
        ({"batches": []}, RecipeError, "batches must be given"),
        ({"batches": [1, 1]}, RecipeError, "each once, but got 1, 1"),
        ({"runtimes": []}, ExportError, "but none is named"),
        ({"runtimes": ["onyx"]}, ExportError, "but got 'onyx'"),
        ({"threads": 0}, RecipeError, "threads must be"),
        ({"seconds": 0}, RecipeError, "seconds must be above 0"),
        ({"runs": 1}, RecipeError, "runs must be"),
    ],
)
def test_wrong_benches(settings, error, words, child):
    with pytest.raises(error, match=words):
        bench.bench({"small": child}, **settings)


def test_a_file_alone_needs_its_runtime(onnx, tmp_path):
    with pytest.raises(ExportError, match=r"file: an ONNX file must run in .* add one of them"):
        bench.bench({"file": onnx})
    (tmp_path / "no.onnx").write_text("not ONNX")
    with pytest.raises(ExportError, match="must be readable ONNX"):
        bench.bench({"file": tmp_path / "no.onnx"}, runtimes=["onnxruntime"])


def test_peak_memory_is_that_of_the_model(onnx, child):
    taken = runtimes.peak_bytes(onnx, (3, *describe(child).image), "onnxruntime", 1, 1)
    assert onnx.stat().st_size / 2 < taken < 2**28


def test_peak_memory_of_a_failure_and_of_a_compiler(tmp_path, monkeypatch):
    assert runtimes.peak_bytes(tmp_path / "x", (3, 8, 8), "compile", 1, 1) is None
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(ExportError, match="must be able to run it in a process of its own, but says: exit code 1"):
        runtimes.peak_bytes(tmp_path / "x.safetensors", (3, 8, 8), "eager", 1, 1)


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["vitrim", "bench", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code or 0


def test_from_the_command_line(parent, child, tmp_path, monkeypatch, capsys):
    for name, model in (("dense", parent), ("small", child)):
        store.save(model, tmp_path / name / "model.safetensors")
    files = [tmp_path / name / "model.safetensors" for name in ("dense", "small")]
    out = tmp_path / "bench.json"
    assert run(monkeypatch, *files, "--batch", "1,2", "--seconds", "0.1", "--out", out) == 0
    table = capsys.readouterr().out
    assert "of dense/model.safetensors" in table
    assert "batch of 2" in table
    record = json.loads(out.read_text())
    assert [line["model"] for line in record["lines"]] == ["dense/model.safetensors", "small/model.safetensors"] * 2
    assert (tmp_path / "bench.svg").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["x", "--batch", "1,x"], "batch must be whole numbers of at least 1, joined by commas, but got 'x'"),
        (["x", "--runtimes", "eager,cuda"], "a runtime must be one of"),
        (["x", "x", "--runtimes", "eager"], "each model must be given once"),
        (["x", "y", "--out", "pyproject.toml/x.json"], "the place must be writable, but is not"),
        (["x", "y", "--out", "tests"], "a file must be named to write to"),
    ],
)
def test_wrong_requests(arguments, words, monkeypatch, capsys):
    assert run(monkeypatch, *arguments) == 2
    assert words in " ".join(capsys.readouterr().err.split())
