"""Eight bits: most answers stay, the loss is told, and wrong requests end before any work."""

import logging
import math
import platform
from collections import Counter

import pytest
import timm
import torch

from tests.samples import WHOLE, apart, images
from tests.tolerance import SINGLE
from vitrim import cli, families
from vitrim.data import Input, eval_loader, split
from vitrim.deploy import export, quantize, store, writers
from vitrim.families import describe
from vitrim.families._segmentor import segmentor
from vitrim.nn.segment import Head
from vitrim.words.errors import DataError, ExportError

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}


@pytest.fixture(scope="module")
def model():
    """A reader of digits, trained for two seconds: eight bits lose little of weights that were learnt."""
    torch.manual_seed(0)
    net = families.adopt(timm.create_model("test_vit", **TINY))
    known = split("digits", seed=0, calibration=256)
    ((images, labels),) = eval_loader(known.calibration, Input.of(net), batch=256)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for _ in range(80):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def loaders(model):
    known = split("digits", seed=0, calibration=32)
    return [eval_loader(part, Input.of(model), batch=16) for part in (known.calibration, known.test)]


def fixed(model):
    """The same for images of one size, without the resampling of positions, for which these runtimes have no form."""
    net = families.adopt(timm.create_model("test_vit", **TINY, dynamic_img_size=False))
    net.load_state_dict(model.state_dict())
    return net.eval()


def test_most_answers_stay_and_the_loss_is_told(model, loaders, tmp_path):
    import onnx

    before = {name: value.clone() for name, value in model.state_dict().items()}
    done = quantize.quantize(model, tmp_path / "m.onnx", loaders[0], test=loaders[1])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]
    assert (done.calibration_images, done.test_images, done.opset) == (32, 450, export.OPSET)
    assert done.bytes == (tmp_path / "m.onnx").stat().st_size
    assert done.top1_before > 50, "else the model reads no digits, and nothing is measured"
    assert abs(done.top1 - done.top1_before) < 8
    assert 80 < done.agreement < 100
    _, run = export.onnx_session(tmp_path / "m.onnx")
    hits = torch.cat([run(x).argmax(-1) == y for x, y in loaders[1]])
    assert done.top1 == pytest.approx(100 * float(hits.double().mean()))
    x = images(describe(model), 2, torch.float32)
    assert SINGLE < apart(run(x), model(x)) < 0.5, "not the float model, and not another one"

    graph = onnx.load(tmp_path / "m.onnx").graph
    kinds = [node.op_type for node in graph.node]
    assert "QuantizeLinear" in kinds
    # Every matrix of weights, and nothing else: products of two activations stay in float32.
    shapes = {
        tensor.name: tuple(tensor.dims) for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT8
    }
    held = sorted(math.prod(shape) for shape in shapes.values() if len(shape) > 1)
    weights = [value.numel() for name, value in model.named_parameters() if name.endswith("weight") and value.dim() > 1]
    assert held == sorted(weights)


@pytest.mark.parametrize(
    ("kind", "weights_only", "least"),
    [(".onnx", True, 98), (".xml", False, 80), *([(".xml", True, 97)] if WHOLE else [])],
)
def test_other_kinds(kind, weights_only, least, model, loaders, tmp_path):
    root = logging.getLogger()
    before = list(root.handlers), root.level
    calibration = None if weights_only else loaders[0]
    done = quantize.quantize(
        model, tmp_path / f"m{kind}", calibration, test=loaders[1], weights_only=weights_only, say=lambda _: None
    )
    assert (list(root.handlers), root.level) == before, "onnxruntime sets up the root logger when it is imported"
    assert (done.weights_only, done.calibration_images, done.test_images) == (
        weights_only,
        32 * (not weights_only),
        450,
    )
    assert {path.name for path in tmp_path.iterdir()} == ({"m.onnx"} if kind == ".onnx" else {"m.xml", "m.bin"})
    assert done.bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert done.agreement > least
    assert abs(done.top1 - done.top1_before) < 100 - least
    session = writers.onnx_session if kind == ".onnx" else writers.openvino_session
    runtime, run = session(tmp_path / f"m{kind}")
    assert runtime == done.runtime
    hits = torch.cat([run(x).argmax(-1) == y for x, y in loaders[1]])
    assert done.top1 == pytest.approx(100 * float(hits.double().mean()))
    x = images(describe(model), 2, torch.float32)
    assert SINGLE < apart(run(x), model(x)) < (0.05 if weights_only else 0.5), (
        "not the float model, and not another one"
    )


@pytest.mark.parametrize(("weights_only", "least"), [(False, 80), (True, 97)])
def test_executorch(weights_only, least, model, loaders, tmp_path):
    pytest.importorskip("executorch")
    done = quantize.quantize(fixed(model), tmp_path / "m.pte", loaders[0], test=loaders[1], weights_only=weights_only)
    assert done.runtime.startswith("executorch ")
    assert done.bytes == (tmp_path / "m.pte").stat().st_size < done.bytes_before
    assert least < done.agreement < 100.01
    _, run = writers.executorch_session(tmp_path / "m.pte")
    x, _ = next(iter(loaders[1]))
    with torch.no_grad():
        same = torch.cat([run(image[None]) for image in x]).argmax(1) == model(x).argmax(1)
    assert float(same.double().mean()) > 0.75


def test_core_ml_has_weights_alone(model, loaders, tmp_path):
    with pytest.raises(ExportError, match=r"an int8 file for Core ML must have weights alone .* use --int8-weights"):
        quantize.quantize(fixed(model), tmp_path / "m.mlpackage", loaders[0])
    pytest.importorskip("coremltools")
    done = quantize.quantize(fixed(model), tmp_path / "m.mlpackage", loaders[0], weights_only=True)
    assert done.bytes < done.bytes_before
    assert (done.agreement is None) == (platform.system() != "Darwin")


def test_weights_alone_take_a_byte_each(tmp_path):
    """Of a model whose weights outweigh the graph: 8.5 bits a weight, and nothing else is in eight bits."""
    import onnx

    net = families.adopt(timm.create_model("test_vit", **TINY | {"embed_dim": 128, "depth": 3})).eval()
    batch = [(images(describe(net), 4, torch.float32), torch.full((4,), -1))]
    done = quantize.quantize(net, tmp_path / "m.onnx", batch, weights_only=True)
    assert 0.2 < done.bytes / done.bytes_before < 0.5
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node)
    assert kinds["MatMulNBits"] == 1 + 4 * 3, "patches, and four linear layers in each block"
    assert done.agreement == 100


@pytest.mark.whole
def test_a_segmentor_answers_for_each_pixel_and_without_a_test_split_the_calibration_images_tell(
    model, loaders, tmp_path
):
    net = segmentor(model, 4, Head(width=32, channels=32)).eval()
    batches = [next(iter(loaders[0]))]
    done = quantize.quantize(net, tmp_path / "m.onnx", batches)
    _, run = export.onnx_session(tmp_path / "m.onnx")
    with torch.no_grad():
        same = run(batches[0][0]).argmax(dim=1) == net(batches[0][0]).argmax(dim=1)
    assert same.shape == (16, 32, 32)
    assert done.agreement == pytest.approx(100 * float(same.double().mean()))
    assert done.agreement > 80
    assert (done.top1, done.top1_before, done.test_images) == (None, None, 0)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("m.pt2", {}, "an int8 file must end in .onnx, .xml, .pte, .mlpackage, but got 'm.pt2'"),
        ("m.onnx", {"percentile": 101}, "percentile must be above 50 and at most 100, but got 101"),
        ("m.onnx", {"opset": 13}, "opset must be at least 18, but got 13"),
        ("no/m.onnx", {}, "must be writable, but is not: no such file"),
        ("", {}, "must end in .onnx"),
    ],
)
def test_wrong_requests_end_before_any_work(name, options, words, model, tmp_path, monkeypatch):
    monkeypatch.setattr(quantize, "export", None)
    with pytest.raises(ExportError, match=words):
        quantize.quantize(model, tmp_path / name, [], **options)
    assert not list(tmp_path.iterdir())


def test_no_images_are_refused(model, tmp_path):
    with pytest.raises(ExportError, match="int8 must be calibrated on images, but there are none"):
        quantize.quantize(model, tmp_path / "m.onnx", [])
    assert not list(tmp_path.iterdir())


def with_a_missing_image(loader, missing):
    """A loader as a caller may write one, of files that it opens as it comes to them."""
    yield from loader
    missing.read_bytes()


def test_an_image_that_is_missing_is_told(model, loaders, tmp_path, monkeypatch):
    monkeypatch.setattr(quantize, "export", None)
    missing = tmp_path / "gone.png"
    with pytest.raises(DataError, match=r"gone\.png: must be readable, but no such file or directory"):
        quantize.quantize(model, tmp_path / "m.onnx", with_a_missing_image(loaders[0], missing))
    assert not list(tmp_path.iterdir())


def test_an_image_that_goes_missing_later_is_told(model, loaders, tmp_path):
    missing = tmp_path / "gone.png"
    (tmp_path / "m.onnx").write_text("what was there")
    with pytest.raises(DataError, match=r"gone\.png: must be readable, but no such file or directory"):
        quantize.quantize(model, tmp_path / "m.onnx", loaders[0], test=with_a_missing_image(loaders[1], missing))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["what was there"]


def test_a_damaged_image_is_told_as_it_is(model, tmp_path):
    def damaged():
        raise DataError("a.png: every image must decode, but it is not an image")
        yield

    with pytest.raises(DataError, match=r"a\.png: every image must decode"):
        quantize.quantize(model, tmp_path / "m.onnx", damaged())


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["vitrim", "export", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code or 0


def test_from_the_command_line(model, tmp_path, monkeypatch, capsys):
    seen = {}

    def told(net, path, calibration, *, test, opset, say, as_stored, weights_only):
        assert not weights_only
        seen.update(calibration=len(calibration.dataset), test=len(test.dataset), mean=test.input.mean, opset=opset)
        return quantize.Quantized(
            path=str(path), opset=opset, bytes=10, bytes_before=40, calibration_images=16, test_images=450, top1=None,
            top1_before=71.25, agreement=98.5, torch="2", runtime="onnxruntime 1",
        )  # fmt: skip

    monkeypatch.setattr(quantize, "quantize", told)
    stored = store.save(model, tmp_path / "model.safetensors")
    asked = [stored, "--out", tmp_path / "m.onnx", "--int8", "--data", "digits", "--set", "data.calibration=16"]
    assert run(monkeypatch, *asked, "--set", "data.mean=[0.1,0.2,0.3]", "--opset", "21") == 0
    assert seen == {"calibration": 16, "test": 450, "mean": (0.1, 0.2, 0.3), "opset": 21}
    out = capsys.readouterr()
    assert "98.50 %" in out.out
    assert "71.25 %" in out.out
    assert "calibrated on 16 images, answers compared on 450 test images" in " ".join(out.err.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--int8"], "int8 must be calibrated and compared on images, but none are given; give --data SRC"),
        (["--int8-weights"], "int8 must be calibrated and compared on images, but none are given; give --data SRC"),
        (["--int8", "--int8-weights"], "--int8 and --int8-weights must not go together"),
        (["--data", "digits"], "must go with --int8"),
        (["--out", "no/m.onnx"], "must be writable, but is not"),
        (["--out", "tests/m.onnx", "--opset", "11"], "opset must be at least 18, but got 11"),
    ],
)
def test_the_command_line_refuses_before_it_opens_the_model(arguments, words, monkeypatch, capsys):
    asked = arguments if "--out" in arguments else [*arguments, "--out", "m.onnx"]
    assert run(monkeypatch, "no_such_model", *asked) == 2
    assert words in " ".join(capsys.readouterr().err.split())
