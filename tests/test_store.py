"""A stored model loads with nothing else and gives the same logits; what a spec cannot carry is refused in time."""

import copy
import errno
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import vitrim
from tests.hub import StandIn
from tests.samples import FEW, IDS, PRESETS, WHOLE, adopted, images, random_plan
from vitrim import families
from vitrim.cut import surgery
from vitrim.deploy import store
from vitrim.families import describe
from vitrim.nn.weights import why_not_like
from vitrim.words.errors import SpecError, StoreError, WeightsError
from vitrim.words.formats import FORMAT
from vitrim.words.plain import dump

EACH = pytest.mark.parametrize(("family", "preset"), PRESETS, ids=IDS)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """These models are so small that a second thread costs more than it gives."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def child(family: str = "vit", preset: str = "plain", seed: int = 3, dtype: torch.dtype = torch.float64) -> Any:
    parent = adopted(family, preset)
    return surgery.apply(parent, random_plan(describe(parent), seed)).to(dtype)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


@EACH
@torch.no_grad()
def test_stored_is_living(family: str, preset: str, file: Path):
    for seed in (None, 0, 1, 2) if WHOLE or (family, preset) in FEW else (None, 1):
        model = adopted(family, preset) if seed is None else child(family, preset, seed)
        assert store.save(model, file) == file
        again = store.load(file)
        spec = describe(model)
        assert type(again) is type(model)
        assert not again.training
        assert describe(again) == store.read_spec(file) == spec
        assert list(again.state_dict()) == list(model.state_dict())
        assert torch.equal(again(images(spec)), model(images(spec)))
    assert list(file.parent.iterdir()) == [file]


def test_a_fresh_process_needs_nothing_else(tmp_path: Path):
    model, file = child(), tmp_path / "far" / "away.safetensors"
    x = images(describe(model))
    store.save(model, file)
    save_file({"x": x}, tmp_path / "x")
    code = (
        "import sys, torch, vitrim; from safetensors.torch import load_file, save_file; folder = sys.argv[1]; "
        "torch.set_num_threads(1); "
        "model = vitrim.load(folder + '/far/away.safetensors'); "
        "save_file({'y': model(load_file(folder + '/x')['x'].clone()).detach()}, folder + '/y')"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=tmp_path)
    assert torch.equal(load_file(tmp_path / "y")["y"], model(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_types_are_kept(dtype: torch.dtype, file: Path):
    model = child(dtype=dtype)
    store.save(model, file)
    again = store.load(file)
    assert {p.dtype for p in again.parameters()} == {dtype}
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    assert all(p.requires_grad for p in again.parameters())


def test_a_hybrid_is_stored_with_its_buffers(file: Path):
    model = families.adopt(timm.create_model("vit_tiny_r_s16_p8_224", img_size=32, depth=2, num_classes=3))
    store.save(model, file)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(store.load(file)(x), model.eval()(x))


def test_what_a_timm_name_knows_is_kept(file: Path):
    parent = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=5, in_chans=1)
    store.save(families.adopt(parent), file)
    again = store.load(file)
    assert timm.data.resolve_model_data_config(again) == timm.data.resolve_model_data_config(parent)
    assert store.read_spec(file).host.name == "vit_tiny_patch16_224"


@pytest.mark.parametrize("training", [True, False])
def test_saving_leaves_the_model_alone(file: Path, training: bool):
    model = child().train(training)
    model.blocks.train(not training)
    modes = [module.training for module in model.modules()]
    before, dice = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    store.save(model, file)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), dice)


def test_provenance(file: Path):
    store.save(child(), file, provenance={"method": "random", "budget": {"macs": 0.5}, "seeds": [1, 2]})
    known = store.provenance(file)
    assert known["given"] == {"method": "random", "budget": {"macs": 0.5}, "seeds": [1, 2]}
    assert (known["vitrim"], known["timm"]) == (vitrim.__version__, timm.__version__)
    assert known["date"].endswith("+00:00")
    with pytest.raises(StoreError, match="provenance must be plain values"):
        store.save(child(), file, provenance={"model": child()})
    assert store.provenance(file) == known


def test_metadata_is_json(file: Path):
    model = child()
    store.save(model, file)
    with safe_open(file, framework="pt") as opened:
        sheet = json.loads(opened.metadata()["vitrim"])
    assert sheet["format"] == FORMAT
    assert sheet["spec"] == json.loads(json.dumps(dump(describe(model))))


def test_loading_again_does_not_hang_on_the_file(file: Path):
    model = child()
    store.save(model, file)
    again = store.load(file)
    x = images(describe(model))
    expected = again(x)
    store.save(child(seed=0), file)
    assert torch.equal(again(x), expected)
    file.unlink()
    assert torch.equal(again(x), expected)


def test_a_folder_and_a_copy(tmp_path: Path):
    store.save(child(), tmp_path / "model.safetensors")
    assert store.read_spec(tmp_path) == describe(child())
    assert store.is_stored(tmp_path)
    assert store.is_stored(str(tmp_path / "model.safetensors"))
    assert store.is_stored("missing.safetensors")
    assert not store.is_stored("vit_tiny_patch16_224")
    assert not store.is_stored("vit_tiny_patch16_224.augreg_in21k")


def custom_head(model: Any) -> None:
    model.head = nn.Sequential(nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 10)).double()


def wider_head(model: Any) -> None:
    model.head = nn.Linear(48, 11).double()


def hook(model: Any) -> None:
    model.register_forward_hook(lambda _m, _i, out: out * 1.001)


def own_forward(model: Any) -> None:
    plain = model.forward_head
    model.forward_head = lambda x, **others: plain(x, **others).abs()


def own_activation(model: Any) -> None:
    next(block.mlp for block in model.blocks if hasattr(block.mlp, "act")).act = nn.ReLU()


def own_parameter(model: Any) -> None:
    model.register_parameter("temperature", nn.Parameter(torch.ones(1, dtype=torch.float64)))


def tied(model: Any) -> None:
    model.norm.bias = model.head_bias = model.norm.weight


def on_meta(model: Any) -> None:
    model.to("meta")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (custom_head, r"lacks head.bias, head.weight"),
        (wider_head, r"head.weight is \(11, 48\), not \(10, 48\)"),
        (own_parameter, r"has besides temperature"),
        (hook, r"logits of the model in memory, but they differ by"),
        (own_forward, r"cannot be stored: stem and head must run on the meta device"),
        (own_activation, r"logits of the model in memory, but they differ by"),
        (tied, r"must be a parameter's own, but are those of head_bias"),
        (on_meta, r"must hold data, but these are on the meta device"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_more_than_a_spec_is_refused(change: Callable[[Any], None], says: str, file: Path):
    file.write_bytes(b"what was here before")
    model = copy.deepcopy(child())
    change(model)
    with pytest.raises(StoreError, match=says):
        store.save(model, file)
    assert file.read_bytes() == b"what was here before"
    assert list(file.parent.iterdir()) == [file]


def test_a_raw_model_is_refused(file: Path):
    with pytest.raises(StoreError, match=r"cannot be stored: .* its blocks are not vitrim's; call vitrim.adopt$"):
        store.save(families.get("vit").example(), file)
    with pytest.raises(StoreError, match=r"cannot be stored: .* but got Linear"):
        store.save(nn.Linear(2, 2), file)
    assert not file.exists()


def test_views_of_one_storage_are_stored_apart(file: Path):
    model = copy.deepcopy(child())
    pair = torch.randn(2, 48, dtype=torch.float64)
    model.norm.weight, model.norm.bias = nn.Parameter(pair[0]), nn.Parameter(pair[1])
    store.save(model, file)
    assert torch.equal(store.load(file).norm.bias, pair[1])


def test_weights_that_are_not_finite_are_not_stored(file: Path):
    model = copy.deepcopy(child())
    with torch.no_grad():
        model.head.weight[0, 0] = torch.nan
    with pytest.raises(WeightsError, match=r"^head.weight: weights must be finite"):
        store.save(model, file)
    assert not file.exists()


@pytest.mark.parametrize("kind", [torch.int32, torch.float8_e4m3fn], ids=str)
def test_weights_that_are_not_computed_in_are_not_stored(kind: torch.dtype, file: Path):
    model = copy.deepcopy(child())
    model.head.weight = nn.Parameter(model.head.weight.detach().to(kind), requires_grad=False)
    with pytest.raises(WeightsError, match=r"^head.weight: weights must be float16, .* but are (int32|float8_e4m3fn)"):
        store.save(model, file)
    assert not file.exists()


def test_buffers_keep_their_types():
    model = nn.BatchNorm1d(3)
    wanted = model.state_dict()
    assert why_not_like(wanted, wanted) is None
    assert why_not_like({**wanted, "running_var": torch.ones(3, dtype=torch.float16)}, wanted) is None
    told = why_not_like({**wanted, "num_batches_tracked": torch.zeros(())}, wanted)
    assert told == "num_batches_tracked: must be int64, but is float32; convert it first"
    told = why_not_like({**wanted, "running_mean": torch.zeros(3, dtype=torch.int64)}, wanted)
    assert told is not None
    assert told.startswith("running_mean: weights must be")


@pytest.mark.skipif(sys.platform == "win32", reason="modes and links are POSIX")
def test_a_place_is_written_as_by_any_program(tmp_path: Path):
    link, real = tmp_path / "link.safetensors", tmp_path / "real.safetensors"
    link.symlink_to(real.name)
    before = os.umask(0o077)
    try:
        store.save(child(), link)
        store.save(child(), tmp_path / "other.safetensors")
    finally:
        os.umask(before)
    assert link.is_symlink()
    assert {oct(path.stat().st_mode)[-3:] for path in (real, tmp_path / "other.safetensors")} == {"600"}
    assert describe(store.load(real)) == describe(child())
    store.save(child(seed=0), link)
    assert link.is_symlink()
    assert describe(store.load(real)) == describe(child(seed=0))


def rewrite(
    file: Path, sheet: Callable[[Any], Any] | None = None, weights: Callable[[dict[str, Any]], None] | None = None
) -> None:
    """Store a good model, then change its metadata or its weights by hand."""
    store.save(child(), file)
    with safe_open(file, framework="pt") as opened:
        metadata = dict(opened.metadata())
    state = load_file(file)
    if sheet is not None:
        data = json.loads(metadata["vitrim"])
        metadata["vitrim"] = json.dumps(sheet(data) or data)
    if weights is not None:
        weights(state)
    save_file(state, file, metadata=metadata)


def check_refused(file: Path, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says) as caught:
        store.load(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file(file: Path):
    check_refused(file, StoreError, "must exist, but it does not")
    with pytest.raises(StoreError, match="must exist"):
        store.read_spec(file)
    with pytest.raises(StoreError, match="must exist"):
        store.provenance(file)


@pytest.mark.parametrize("keep", [0, 5, 200, 20_000, -1])
def test_a_truncated_file(file: Path, keep: int):
    store.save(child(), file)
    file.write_bytes(file.read_bytes()[:keep])
    check_refused(file, StoreError, "must be whole safetensors, but")


def test_a_file_of_something_else(file: Path):
    file.write_bytes(b"PK\x03\x04 this is no safetensors file at all")
    check_refused(file, StoreError, "must be whole safetensors, but")


def test_plain_weights(file: Path):
    save_file(families.get("vit").example().state_dict(), file)
    check_refused(file, StoreError, "pass this file as --weights")


@pytest.mark.parametrize(
    ("sheet", "says"),
    [
        (
            lambda d: d.update(format=FORMAT + 1),
            rf"format must be at most {FORMAT}, but is {FORMAT + 1}; install a newer",
        ),
        (lambda d: d.update(format="one"), r"format must be a whole number"),
        (lambda d: [1, 2], r"format must be a whole number"),
        (lambda d: d.pop("spec") and None, r"spec: "),
        (lambda d: d["spec"].pop("image") and None, r"spec.image: this field is required"),
        (lambda d: d["spec"].update(imag=1), r"spec: Spec has no field 'imag'; did you mean 'image'\?"),
        (lambda d: d["spec"]["stages"][0].update(width=-4), r"spec.stages.0.width"),
    ],
)
def test_a_sheet_that_is_wrong(file: Path, sheet: Any, says: str):
    rewrite(file, sheet)
    check_refused(file, StoreError, says)


def test_a_sheet_that_is_no_json(file: Path):
    save_file({"x": torch.zeros(1)}, file, metadata={"vitrim": "{not json"})
    check_refused(file, StoreError, "must be JSON")


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s["host"]["arguments"].pop("distilled") and None,
        lambda s: s["host"]["arguments"].update(wings=2),
        lambda s: s["host"]["arguments"].update(global_pool="sideways"),
        lambda s: s["host"]["arguments"]["norm"].update(name="timm.BatchNorm9"),
        lambda s: s.update(family="perceiver"),
        lambda s: s.update(stages=[]),
        lambda s: s["stages"][0].update(blocks=[]),
    ],
)
def test_a_host_that_cannot_be_built(file: Path, change: Any):
    rewrite(file, lambda d: change(d["spec"]))
    with pytest.raises((SpecError, WeightsError, StoreError)):
        store.load(file)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.pop("norm.weight") is None, r"it lacks norm.weight"),
        (lambda s: s.update(extra=torch.zeros(2)), r"it has besides extra"),
        (lambda s: s.update({"norm.weight": torch.zeros(3)}), r"norm.weight is \(3,\), not \(48,\)"),
        (
            lambda s: s.update({"norm.weight": s["norm.weight"].to(torch.int32)}),
            r"norm.weight: weights must be .* int32",
        ),
        (
            lambda s: s.update({"norm.weight": s["norm.weight"].to(torch.float8_e4m3fn)}),
            r"norm.weight: weights must be float16, .* but are float8_e4m3fn; convert them first",
        ),
        (lambda s: s["norm.weight"].fill_(torch.inf), r"norm.weight: weights must be finite, but some are NaN"),
    ],
)
def test_weights_that_do_not_fit(file: Path, change: Any, says: str):
    rewrite(file, weights=change)
    check_refused(file, WeightsError, says)


def test_no_disk_space(file: Path, monkeypatch: pytest.MonkeyPatch):
    file.write_bytes(b"what was here before")

    def full(state: Any, path: Path, **_: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(store, "save_file", full)
    with pytest.raises(StoreError, match=r"must be written here, but no space left on device; make room"):
        store.save(child(), file)
    assert file.read_bytes() == b"what was here before"
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
@pytest.mark.whole
def test_a_file_that_may_not_grow(tmp_path: Path):
    """The operating system itself refuses in the middle of writing."""
    code = (
        "import resource, sys, vitrim; from pathlib import Path; "
        "from vitrim import families; from vitrim.deploy import store; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)); "
        "model = vitrim.adopt(families.get('vit').example())\n"
        "try: store.save(model, Path(sys.argv[1]) / 'm.safetensors')\n"
        "except vitrim.VitrimError as problem: print(problem)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True)
    assert "must be written here, but" in done.stdout
    assert len(done.stdout.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="must be written here, but"):
        store.save(child(), tmp_path / "file" / "model.safetensors")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StoreError, match="must be written here, but"):
        store.save(child(), tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.fixture
def hub() -> Iterator[str]:
    StandIn.files, StandIn.whole = {("owner/timms", "config.json"): b"{}"}, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


VISIT = """
import sys, vitrim
from vitrim.deploy import store

def attempt(name, call):
    try:
        print(name, call())
    except vitrim.VitrimError as problem:
        print(name, type(problem).__name__, problem)

file = sys.argv[1]
model = store.load(file)
attempt("push", lambda: store.save(model, "hf-hub:owner/small", provenance={"from": "here"}))
attempt("spec", lambda: store.read_spec("hf-hub:owner/small") == store.read_spec(file))
attempt("load", lambda: type(store.load("hf-hub:owner/small@main")).__name__)
attempt("given", lambda: store.provenance("hf-hub:owner/small")["given"])
attempt("stored", lambda: (store.is_stored("hf-hub:owner/small"), store.is_stored("hf-hub:owner/timms")))
attempt("none", lambda: store.hub_file("hf-hub:owner/timms"))
attempt("plain", lambda: store.hub_file("hf-hub:owner/plain"))
attempt("timms", lambda: store.load("hf-hub:owner/timms"))
attempt("missing", lambda: store.load("hf-hub:owner/missing"))
attempt("revision", lambda: store.load("hf-hub:owner/small@other"))
attempt("name", lambda: store.load("hf-hub:no/such/name"))
attempt("refused", lambda: store.save(vitrim.families.get("vit").example(), "hf-hub:owner/raw"))
"""


def visit(endpoint: str, tmp_path: Path) -> dict[str, str]:
    """What a fresh process says, for huggingface_hub reads its settings once."""
    store.save(child(), tmp_path / "model.safetensors")
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_TOKEN": "hf_standin",
        "NO_PROXY": "127.0.0.1",
    }
    done = subprocess.run(
        [sys.executable, "-c", VISIT, str(tmp_path / "model.safetensors")],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(line.split(" ", 1) for line in done.stdout.splitlines())


def test_the_hub(hub: str, tmp_path: Path):
    save_file(families.get("vit").example().state_dict(), tmp_path / "plain.safetensors")
    StandIn.files["owner/plain", "model.safetensors"] = (tmp_path / "plain.safetensors").read_bytes()
    said = visit(hub, tmp_path)
    assert said["push"] == "hf-hub:owner/small"
    assert said["spec"] == "True"
    assert StandIn.whole == [("owner/small", "model.safetensors")], "headers alone tell what a repository holds"
    assert said["load"] == "VisionTransformer"
    assert said["given"] == "{'from': 'here'}"
    assert said["stored"] == "(True, False)"
    assert said["none"] == said["plain"] == "None"
    assert said["timms"].startswith("StoreError hf-hub:owner/timms: the repository must hold a model that vitrim")
    for name in ("missing", "revision", "name"):
        assert said[name].startswith("StoreError hf-hub:"), said[name]
        assert "the repository must be there to read, but" in said[name]
    assert "Repository Not Found" in said["missing"]
    assert said["refused"].startswith("StoreError this model cannot be stored")
    assert ("owner/raw", ".gitattributes") not in StandIn.files
    stored = tmp_path / "again.safetensors"
    stored.write_bytes(StandIn.files["owner/small", "model.safetensors"])
    assert store.read_spec(stored) == describe(child())


def test_no_hub():
    """The tests run offline, so nothing is asked and nothing is found."""
    with pytest.raises(StoreError, match=r"^hf-hub:owner/small: the repository must be there to read, but "):
        store.is_stored("hf-hub:owner/small")
