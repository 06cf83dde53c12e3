"""A model goes to the Hub with a card that tells what is known, and comes back the same."""

import json
import shutil
import zipfile
from pathlib import Path

import pytest
import timm
import torch
import yaml

import vitrim.hub
from tests.tolerance import SINGLE
from vitrim import cli, families
from vitrim.cut.surgery import apply
from vitrim.deploy import hub, push, remote, store
from vitrim.families import describe
from vitrim.families._segmentor import segmentor
from vitrim.measure import cost
from vitrim.nn.segment import Head
from vitrim.run.pipeline import compress
from vitrim.words.errors import StoreError, WeightsError
from vitrim.words.plan import BlockPlan, Plan

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder whose recipe names folders of this machine."""
    root = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    net = timm.create_model("test_vit", **TINY)
    compress(net, "digits", method="magnitude", budget="macs=0.7", out=root / "half", measure={"seconds": 0.1})
    return root / "half"


def described(folder):
    text = (folder / "README.md").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_the_card_tells_what_is_known(run, tmp_path):
    done = push.push(run, "owner/small", licence="mit", folder=tmp_path / "out")
    assert sorted(done.files) == ["README.md", "config.json", "model.safetensors"]
    measured = json.loads((run / "measured.json").read_text())
    front, body = described(tmp_path / "out")
    assert (front["license"], front["library_name"]) == ("mit", "timm")
    (entry,) = front["model-index"]
    (result,) = entry["results"]
    assert result["metrics"] == [{"type": "accuracy", "value": round(measured["top1"], 3)}]
    assert result["dataset"]["name"] == "digits"
    for text in ("# small", "macs=0.7", "magnitude", "digits", "mit", 'vitrim.load("hf-hub:owner/small")'):
        assert text in body
    for text in (
        f"{measured['top1']:.1f} %",
        f"{measured['latency_ratio']:.3f}",
        measured["device"],
        measured["torch"],
    ):
        assert text in body
    assert body.count("stages.0.blocks.") == 2, "a line for each block"
    assert "Top-1 on 450 images of digits." in body


def test_what_was_pushed_loads(run, tmp_path):
    push.push(run, "owner/small", licence="mit", folder=tmp_path / "out")
    mine, theirs = store.load(run), store.load(tmp_path / "out")
    named = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(theirs(x), mine(x))
        assert torch.equal(named(x), mine(x))
    assert describe(named) == describe(mine)
    config = timm.data.resolve_model_data_config(named)
    assert config == timm.data.resolve_model_data_config(mine)
    head = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=3)
    assert head(x).shape == (2, 3)
    with pytest.raises(StoreError, match="must be opened as it is, but got embed_dim"):
        timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, embed_dim=16)
    with pytest.raises(StoreError, match="but has no structure"):
        timm.create_model(vitrim.hub.ARCHITECTURE)


def test_no_folder_of_this_machine_is_pushed(tmp_path):
    torch.manual_seed(0)
    net = families.adopt(timm.create_model("test_vit", **TINY).eval())
    recipe = {
        "model": {"name": "/home/me/secret/parent.safetensors", "weights": "~/secret/w.pth"},
        "data": {"train": "/data/secret/birds.tar", "test": "wds//data/secret/shards"},
        "seed": 0,
    }
    store.save(net, tmp_path / "m.safetensors", provenance={"recipe": recipe})
    push.push(tmp_path / "m.safetensors", "owner/small", licence="cc0-1.0", folder=tmp_path / "out")
    for path in (tmp_path / "out").iterdir():
        assert b"secret" not in path.read_bytes(), path.name
    _, body = described(tmp_path / "out")
    assert "birds.tar" in body
    assert "parent.safetensors" in body


def test_a_segmentor_has_its_own_words(tmp_path):
    torch.manual_seed(0)
    net = segmentor(timm.create_model("test_vit", **TINY).eval(), 4, Head(width=32, channels=32)).eval()
    recipe = {"model": {"name": "mine"}, "data": {"train": "scenes", "test": "scenes"}}
    store.save(net, tmp_path / "run" / "model.safetensors", provenance={"recipe": recipe})
    measured = {"task": "segmentation", "macs": cost(net).macs, "miou": 51.2, "batch": 8, "latency_ms": 12.5}
    (tmp_path / "run" / "measured.json").write_text(json.dumps(measured))
    push.push(tmp_path / "run", "owner/roads", licence="mit", folder=tmp_path / "out")
    front, body = described(tmp_path / "out")
    assert front["pipeline_tag"] == "image-segmentation"
    assert front["model-index"][0]["results"][0]["metrics"] == [{"type": "mean_iou", "value": 51.2}]
    assert "mean intersection over union | 51.20 % |" in body
    again, x = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(x), net(x))


class Hub:
    """As much of the Hub's client as a push needs: repositories are folders."""

    def __init__(self, root, fault=None):
        self.root, self.fault, self.calls = root, fault, []

    def __call__(self):
        return self

    def create_repo(self, name, *, exist_ok, private):
        assert exist_ok
        self.calls.append(("create", name, private))
        (self.root / name).mkdir(parents=True, exist_ok=True)

    def upload_folder(self, *, folder_path, repo_id, revision, commit_message):
        if self.fault:
            raise self.fault
        self.calls.append(("upload", repo_id, revision))
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)


def test_a_push_makes_the_repository_and_fills_it(run, tmp_path, monkeypatch):
    hub = Hub(tmp_path)
    monkeypatch.setattr(remote, "HfApi", hub)
    done = push.push(run, "owner/small", licence="mit", private=True, revision="v1")
    assert hub.calls == [("create", "owner/small", True), ("upload", "owner/small", "v1")]
    assert done.folder is None
    assert {path.name: path.stat().st_size for path in (tmp_path / "owner" / "small").iterdir()} == done.files
    with torch.no_grad():
        x = torch.randn(1, 3, 32, 32)
        assert torch.equal(store.load(tmp_path / "owner" / "small")(x), store.load(run)(x))


def test_what_the_hub_says_is_told(run, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "HfApi", Hub(tmp_path, OSError("no route to host")))
    with pytest.raises(
        StoreError, match=r"owner/small: the repository must be there to write, but no route to host; see"
    ):
        push.push(run, "owner/small", licence="mit")


def test_the_licence_is_timms_or_asked_for(run, tmp_path):
    known = {"name": "vit_tiny_patch16_224", "weights": None, "random_weights": False}
    assert push._licence_of(known, tmp_path) == "apache-2.0"
    for other in ({"weights": "mine.pth"}, {"random_weights": True}, {"name": "mine"}):
        with pytest.raises(StoreError, match=r"license of the parent's weights must be known.* give --license"):
            push._licence_of({**known, **other}, tmp_path)
    with pytest.raises(StoreError, match="give --license"):
        push.push(run, "owner/small", folder=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def stored(model, place, **model_table):
    """A stored file of a model, with a recipe's table of it if one is given."""
    given = {"recipe": {"model": model_table, "data": {}}} if model_table else {}
    return store.save(families.adopt(model.eval()), place / "m.safetensors", provenance=given)


def test_timm_alone_opens_what_its_own_blocks_can_say(tmp_path):
    """Dense, and with as many neurons less in every block; with uneven ones it takes vitrim."""
    torch.manual_seed(0)
    dense = families.adopt(timm.create_model("test_vit", **TINY, init_values=0.1).eval())
    spec, x = describe(dense), torch.randn(2, 3, 32, 32)
    kept = {"dense": (None, None), "even": (tuple(range(40)),) * 2, "uneven": (tuple(range(40)), tuple(range(41)))}
    for name, widths in kept.items():
        child = apply(dense, Plan.of(spec, [BlockPlan(hidden=width) if width else BlockPlan() for width in widths]))
        push.push(store.save(child, tmp_path / f"{name}.safetensors"), "o/n", licence="mit", folder=tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        opened = timm.create_model(f"local-dir:{tmp_path / name}", pretrained=True).eval()
        with torch.no_grad():
            assert torch.allclose(opened(x), child(x), rtol=SINGLE, atol=SINGLE)
        plain = name != "uneven"
        assert (config["architecture"] == "test_vit") == plain
        assert (type(opened.blocks[0]).__module__ == "timm.models.vision_transformer") == plain
        text = (tmp_path / name / "README.md").read_text(encoding="utf-8")
        assert ("timm alone opens it" in text) == plain
        assert ("import vitrim.hub" in text) != plain


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_base_patch16_clip_224", "swin_tiny_patch4_window7_224"])
def test_timm_alone_opens_names_of_its_own(name):
    with torch.device("meta"):
        spec = describe(timm.create_model(name, num_classes=7))
    found = hub.plain_timm(spec)
    assert found is not None
    assert found.name == name
    assert json.loads(json.dumps(dict(found.arguments))) == dict(found.arguments)


def test_names_of_vitrim_are_not_timms():
    with torch.device("meta"):
        assert hub.plain_timm(describe(timm.create_model("t2t_vit_7"))) is None


@pytest.mark.parametrize(
    ("table", "base", "parent"),
    [
        ({"name": "vit_tiny_patch16_224"}, "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", "vit_tiny_patch16_224 of"),
        ({"name": "vit_tiny_patch16_224", "random_weights": True}, None, "vit_tiny_patch16_224 with random weights"),
        ({"name": "test_vit", "weights": "/home/me/w.pth"}, None, "test_vit with the weights of w.pth"),
        ({"name": "hf-hub:owner/base@v1"}, "owner/base", "owner/base"),
        ({"name": "(VisionTransformer in memory, 12345678)"}, None, "a model in memory (VisionTransformer in memory,"),
        ({"name": "runs/half/model.safetensors"}, None, "runs/half/model.safetensors"),
        ({}, None, "not recorded; a test_vit by its structure"),
    ],
)
def test_the_card_credits_only_weights_that_were_taken(table, base, parent, tmp_path):
    torch.manual_seed(0)
    file = stored(timm.create_model("test_vit", **TINY), tmp_path, **table)
    push.push(file, "owner/small", licence="mit", folder=tmp_path / "out")
    front, body = described(tmp_path / "out")
    assert front.get("base_model") == base
    assert f"| parent | {parent}" in body.replace("\\", "")
    assert "| classes | 10 |" in body


def test_exported_files_lie_beside_it(tmp_path):
    torch.manual_seed(0)
    file = stored(timm.create_model("test_vit", **TINY), tmp_path)
    done = push.push(file, "o/n", licence="mit", folder=tmp_path / "out", also=["pt2", "pt2"])
    assert sorted(done.files) == ["README.md", "config.json", "model.pt2", "model.safetensors"]
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        again = torch.export.load(tmp_path / "out" / "model.pt2").module()(x)
        assert torch.allclose(again, store.load(file)(x), rtol=1e-4, atol=1e-4)
    with zipfile.ZipFile(tmp_path / "out" / "model.pt2") as archive:
        held = b"".join(archive.read(name) for name in archive.namelist())
    assert str(Path(timm.__file__).parent).encode() not in held, "no folder of this machine"
    assert str(Path(vitrim.__file__).parent).encode() not in held
    _, body = described(tmp_path / "out")
    assert "Without any of them: `model.pt2`" in body
    with pytest.raises(StoreError, match="a further form must be one of onnx, pt2, but got 'tflite'"):
        push.push(file, "o/n", licence="mit", folder=tmp_path / "two", also=["tflite"])
    assert not (tmp_path / "two").exists()


def test_wrong_requests(run, tmp_path):
    for name in ("small", "a/b/c", "/small", "owner/"):
        with pytest.raises(StoreError, match="must be named owner/name"):
            push.push(run, name, licence="mit")
    with pytest.raises(StoreError, match="must be a run folder or a file that vitrim stored, but it is neither"):
        push.push(tmp_path / "no", "owner/small", licence="mit")
    with pytest.raises(StoreError, match="must be new or empty"):
        push.push(run, "owner/small", licence="mit", folder=run)
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="must be writable and have room, but not a directory"):
        push.push(run, "owner/small", licence="mit", folder=tmp_path / "file" / "out")


def test_a_full_disk_leaves_no_half_of_a_push(run, tmp_path, monkeypatch):
    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(push, "write_text", full)
    with pytest.raises(StoreError, match="must be writable and have room, but no space left on device"):
        push.push(run, "owner/small", licence="mit", folder=tmp_path / "new" / "out")
    assert list(tmp_path.iterdir()) == []


def test_numbers_of_another_model_are_refused(run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    torch.manual_seed(0)
    store.save(families.adopt(timm.create_model("test_vit", **TINY).eval()), other / "model.safetensors")
    with pytest.raises(
        StoreError, match=r"measured\.json: what was measured must be of this model .* but is of another"
    ):
        push.push(other, "owner/small", licence="mit", folder=tmp_path / "out")


@pytest.mark.parametrize(
    "given",
    [
        {"recipe": "x.toml"},
        {"recipe": {"model": "a name", "data": ["train"]}},
        {"recipe": None},
        {"recipe": {"model": {"name": 3}, "data": {"test": 5}}},
    ],
)
def test_a_provenance_of_ones_own_is_no_recipe(given, tmp_path):
    torch.manual_seed(0)
    net = families.adopt(timm.create_model("test_vit", **TINY).eval())
    store.save(net, tmp_path / "m.safetensors", provenance=given)
    push.push(tmp_path / "m.safetensors", "owner/small", licence="mit", folder=tmp_path / "out")
    front, _ = described(tmp_path / "out")
    assert front["license"] == "mit"
    with pytest.raises(StoreError, match=r"license of the parent's weights must be known.* give --license"):
        push.push(tmp_path / "m.safetensors", "owner/small", folder=tmp_path / "two")


def test_a_damaged_model_is_not_pushed(run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    data = (other / "model.safetensors").read_bytes()
    (other / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises((StoreError, WeightsError)):
        push.push(other, "owner/small", licence="mit", folder=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_from_the_command_line(run, tmp_path, monkeypatch, capsys):
    asked = ["vitrim", "push", str(run), "owner/small", "--license", "mit"]
    for extra, told in ((["--dry-run"], "license: "), (["--folder", str(tmp_path / "out")], "")):
        monkeypatch.setattr("sys.argv", [*asked, *extra])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code
        out = capsys.readouterr()
        assert told in out.out
        assert "would push README.md" in out.err
    assert (tmp_path / "out" / "model.safetensors").is_file()
