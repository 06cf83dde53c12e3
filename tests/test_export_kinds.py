"""Files for OpenVINO, ExecuTorch, Core ML and TensorRT: written whole, checked against eager PyTorch where they run."""

import copy
import importlib.util
import platform

import pytest
import torch

from tests.children import child, child_of
from tests.samples import WHOLE, apart, images
from tests.tensorrt import why_not_tensorrt
from vitrim import cli, families
from vitrim.deploy import export, store, writers
from vitrim.families import describe
from vitrim.words.errors import ExportError


def installed(*names):
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed")


def cut():
    return copy.deepcopy(child("vit", "plain", "heads")).float()


@installed("openvino")
def test_openvino_is_eager_at_any_batch(tmp_path):
    model = cut()
    done = export.export(model, tmp_path / "model.xml")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.bin", "model.xml"]
    assert done.apart < export.PARITY
    assert done.batch is None
    assert done.bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    _, run = writers.openvino_session(tmp_path / "model.xml")
    x = images(describe(model), 4, torch.float32)
    with torch.no_grad():
        assert apart(run(x), model(x)) < export.PARITY


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_a_fixed_batch(suffix, tmp_path):
    model, path = cut(), tmp_path / f"model{suffix}"
    done = export.export(model, path, batch=2)
    assert done.batch == 2
    assert done.apart < export.PARITY
    x = images(describe(model), 3, torch.float32)
    run = export.onnx_session(path)[1] if suffix == ".onnx" else torch.export.load(path).module()
    run(x[:2])
    with pytest.raises(Exception, match=r"(?i)2|dimension|guard"):
        run(x)


@pytest.mark.parametrize(
    "kind", ("dead conv3-normed-norm grid-linear-sized merged top_k" if WHOLE else "merged").split()
)
def test_tensorrt_has_a_form_of_every_operator(kind, tmp_path):
    parent = families.adopt(families.get("vit").example(depth=2).eval())  # for a file takes as long as it has operators
    model = child_of(parent, kind)
    assert model is not None
    export.export(model, tmp_path / "model.onnx", batch=1)
    assert why_not_tensorrt(tmp_path / "model.onnx") == []


def test_the_checker_sees_what_tensorrt_refuses(tmp_path):
    export.export(cut(), tmp_path / "model.onnx")
    assert why_not_tensorrt(tmp_path / "model.onnx") == [
        "images must have a static shape",
        "logits must have a static shape",
    ]


@installed("executorch")
def test_executorch_is_eager(tmp_path):
    model = cut()
    done = export.export(model, tmp_path / "model.pte")
    assert [path.name for path in tmp_path.iterdir()] == ["model.pte"]
    assert (done.kind, done.batch) == ("executorch", 1)
    assert done.apart < export.PARITY


@installed("coremltools")
def test_core_ml_is_written_whole(tmp_path):
    done = export.export(cut(), tmp_path / "model.mlpackage")
    assert [path.name for path in tmp_path.iterdir()] == ["model.mlpackage"]
    assert (tmp_path / "model.mlpackage" / "Manifest.json").is_file()
    assert (done.apart is None) == (platform.system() != "Darwin")
    assert done.bytes > 10_000
    with pytest.raises(ExportError, match="must be new, but it exists"):
        export.export(cut(), tmp_path / "model.mlpackage")


@pytest.mark.parametrize(
    ("suffix", "package", "extra"),
    [(".pte", "executorch", "executorch"), (".mlpackage", "coremltools", "coreml"), (".xml", "openvino", "openvino")],
)
def test_a_missing_package_names_the_extra(suffix, package, extra, monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else object())
    with pytest.raises(ExportError, match=rf"{package} must be installed for this.*vitrim\[{extra}\]"):
        export.export(cut(), tmp_path / f"model{suffix}")
    assert not list(tmp_path.iterdir())


def test_a_batch_must_hold_an_image(tmp_path):
    with pytest.raises(ExportError, match="batch must be at least 1, but got 0"):
        export.export(cut(), tmp_path / "model.onnx", batch=0)


def test_the_command_line_takes_a_batch(tmp_path, monkeypatch, capsys):
    store.save(cut(), tmp_path / "model.safetensors")
    out = tmp_path / "model.pt2"
    command = ["vitrim", "export", str(tmp_path / "model.safetensors"), "--out", str(out), "--batch", "4"]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code in (0, None)
    assert "4 images of" in capsys.readouterr().err.replace("\n", " ")
