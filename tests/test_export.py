"""Cut, stored, loaded and written for another runtime: the logits are eager PyTorch's, or nothing is written."""

import errno

import pytest
import torch

from tests.samples import WHOLE, apart, images, random_plan
from tests.tolerance import SINGLE
from vitrim import cli, families
from vitrim.cut import surgery
from vitrim.deploy import export, store, writers
from vitrim.families import describe
from vitrim.words.costs import cost_of
from vitrim.words.errors import ExportError, StoreError
from vitrim.words.plan import BlockPlan, Plan

CASES = [
    ("vit", "registers"),
    ("swin", "windows"),
    ("eva", "dinov3"),
    ("beit", "own"),
    ("t2t", "performer"),
    ("relpos", "network"),
    ("swin_v2", "windows"),
]
AS_ONNX = CASES if WHOLE else CASES[:2]
"""Families written as ONNX, which takes about twice as long as torch.export's file; each family is written as that."""


SHORT = {"vit": {"depth": 2}, "t2t": {"depth": 1}, "swin": {"depths": (2, 1)}}
"""Blocks of a model to export: writing a file takes as long as it has operators."""


def child(family, preset, seed=3):
    """A cut model with timm's own initial weights: float32 must resolve its logits."""
    torch.manual_seed(0)
    module = families.get(family)
    parent = families.adopt(module.example(**module.TEST_PRESETS[preset], **SHORT.get(family, {})).eval())
    return surgery.apply(parent, random_plan(describe(parent), seed, drops="mixed"))


@pytest.mark.parametrize(("family", "preset"), AS_ONNX)
def test_onnx_is_eager_at_any_batch(family, preset, tmp_path):
    store.save(child(family, preset), tmp_path / "model.safetensors")
    model = store.load(tmp_path / "model.safetensors").eval()
    done = export.export(model, tmp_path / "model.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.safetensors"]
    assert done.apart < export.PARITY
    assert done.bytes == (tmp_path / "model.onnx").stat().st_size
    runtime, run = export.onnx_session(tmp_path / "model.onnx")
    assert runtime == done.runtime
    spec = describe(model)
    for count in (2, 7):
        x = images(spec, count, torch.float32)
        with torch.no_grad():
            assert apart(run(x), model(x)) < export.PARITY


@pytest.mark.whole
def test_a_last_block_without_patches(tmp_path):
    torch.manual_seed(0)
    parent = families.adopt(families.get("vit").example().eval())
    spec = describe(parent)
    last = len(spec.blocks()) - 1
    small = surgery.apply(parent, Plan.of(spec, [BlockPlan(only_prefix=i == last) for i in range(last + 1)]))
    assert cost_of(describe(small)).macs < cost_of(spec).macs
    export.export(small, tmp_path / "model.onnx")
    _, run = export.onnx_session(tmp_path / "model.onnx")
    x = images(spec, 4, torch.float32)
    with torch.no_grad():
        assert apart(run(x), parent(x)) < export.PARITY


@pytest.mark.parametrize(("family", "preset"), [("vit", "plain"), *CASES[1:]])
def test_program(family, preset, tmp_path):
    model = child(family, preset)
    export.export(model, tmp_path / "model.pt2")
    again = torch.export.load(tmp_path / "model.pt2").module()
    x = images(describe(model), 4, torch.float32)
    with torch.no_grad():
        assert apart(again(x), model(x)) < SINGLE


def test_the_model_is_left_as_it_was(tmp_path):
    model = child("vit", "plain").double().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export.export(model, tmp_path / "model.pt2")
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_file_that_differs_is_not_written(tmp_path, monkeypatch):
    honest = writers.onnx_session

    def off(path, threads=None):
        name, run = honest(path, threads)
        return name, lambda x: run(x) * 1.01

    monkeypatch.setattr(writers, "onnx_session", off)
    (tmp_path / "model.onnx").write_text("what was there")
    with pytest.raises(ExportError, match="must stay within 1e-04 of eager's, but differ by 1"):
        export.export(child("vit", "plain"), tmp_path / "model.onnx")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["what was there"]


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("model.tflite", {}, "must end in .onnx or .pt2 or .xml or .pte or .mlpackage, but got 'model.tflite'"),
        ("model.onnx", {"opset": 17}, "opset must be at least 18, but got 17"),
        ("nowhere/model.pt2", {}, "must be writable, but is not: no such file"),
    ],
)
def test_wrong_requests(name, options, words, tmp_path):
    with pytest.raises(ExportError, match=words):
        export.export(child("vit", "plain"), tmp_path / name, **options)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxruntime" else object())
    with pytest.raises(ExportError, match=r"onnxruntime must be installed for this, but is not; run pip install"):
        export.export(child("vit", "plain"), tmp_path / "model.onnx")


def fail(path, problem):
    with export.beside(path) as part:
        part.write_text("half")
        raise problem(part)


@pytest.mark.parametrize(
    ("problem", "kind", "words"),
    [
        (
            lambda part: OSError(errno.ENOSPC, "No space left on device"),
            ExportError,
            "m.onnx: must be writable, but is not",
        ),
        (
            lambda part: OSError(errno.EACCES, "Permission denied", str(part)),
            ExportError,
            "but is not: permission denied",
        ),
        (
            lambda part: FileNotFoundError(errno.ENOENT, "No such file", "/other/a.png"),
            FileNotFoundError,
            "/other/a.png",
        ),
        (lambda part: OSError("image file is truncated"), OSError, "^image file is truncated$"),
        (lambda part: StoreError("a sentence"), StoreError, "^a sentence$"),
    ],
)
def test_only_a_fault_of_the_place_is_told_as_one(problem, kind, words, tmp_path):
    (tmp_path / "m.onnx").write_text("what was there")
    with pytest.raises(kind, match=words) as caught:
        fail(tmp_path / "m.onnx", problem)
    assert type(caught.value) is kind
    assert [path.read_text() for path in tmp_path.iterdir()] == ["what was there"]


def test_a_link_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    link = tmp_path / "m.onnx"
    link.symlink_to(tmp_path / "real" / "n.onnx")
    with export.beside(link) as part:
        part.write_text("new")
    assert link.is_symlink()
    assert (tmp_path / "real" / "n.onnx").read_text() == "new"
    assert {path.name for path in tmp_path.rglob("*")} == {"real", "m.onnx", "n.onnx"}


def test_weights_must_be_there(tmp_path):
    spec = describe(child("vit", "plain"))
    with torch.device("meta"):
        model = families.build(spec)
    with pytest.raises(ExportError, match="meta device"):
        export.export(model, tmp_path / "model.pt2")


def test_from_the_command_line(tmp_path, monkeypatch, capsys):
    store.save(child("vit", "plain"), tmp_path / "model.safetensors")
    where = tmp_path / "out.pt2"
    monkeypatch.setattr("sys.argv", ["vitrim", "export", str(tmp_path / "model.safetensors"), "--out", str(where)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code in (0, None)
    assert where.is_file()
    assert "logits apart" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", [*["vitrim", "export", str(tmp_path / "model.safetensors")], "--out", "x.bin"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
