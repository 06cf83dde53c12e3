"""Secrets planted wherever a user can write text are in nothing that leaves, and passwords in no file at all."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from tests.test_cli import CLASSES, TINY, call, pictures  # noqa: F401
from vitrim.words.plain import read_toml
from vitrim.words.private import hide_passwords, public

LEAVING = "PLANTED-IN-A-PATH"
PASSWORD = "PLANTED-AS-A-PASSWORD"

TOKEN = "hf_PLANTEDasAtokenOfTheHub"

PLANTED = 16
"""Secrets that `test_nothing_that_leaves_holds_a_secret` plants.

Eleven places: of weights, of the teacher's, of an overlay for each of both, of both splits, a class map, a note, a
method, a path of Windows, and the home. Five passwords: of a storage, of its query, of the addresses of both overlays,
a token.
"""


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("postgresql://me:WORD@host:5432/db", "postgresql://***@host:5432/db"),
        ("mysql+pymysql://me:W/O@R:D@host/db?x=1", "mysql+pymysql://***@host/db?x=1"),
        ("https://WORD@github.com/x", "https://***@github.com/x"),
        ("https://host/w.pth?X-Amz-Signature=WORD&part=2", "https://host/w.pth?X-Amz-Signature=***&part=2"),
        ("grpc://host:13000?password=WORD", "grpc://host:13000?password=***"),
        (
            "told: could not connect to redis://:WORD@host/0, sorry",
            "told: could not connect to redis://***@host/0, sorry",
        ),
        ("hf_" + "W" * 30, "***"),
        ("hf-hub:owner/name@main", "hf-hub:owner/name@main"),
        ("sqlite:///runs/trials.db", "sqlite:///runs/trials.db"),
        ("https://host:8080/a/b", "https://host:8080/a/b"),
    ],
)
def test_passwords_are_hidden(text, hidden):
    assert hide_passwords(text) == hidden
    assert hide_passwords({"a": [text, 1], "b": None}) == {"a": [hidden, 1], "b": None}


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("/home/me/data", "data"),
        ("~/data/cats and dogs", "cats and dogs"),
        ("~me/data", "data"),
        ("../me/w.safetensors", "w.safetensors"),
        ("file:///home/me/w.pth", "w.pth"),
        ("file://host/home/me/w.pth", "w.pth"),
        (r"C:\Users\me\w.pth", "w.pth"),
        ("D:/me/data", "data"),
        (r"\\server\me\data", "data"),
        ("wds//home/me/shards", "wds/shards"),
        ("torch/cifar10", "torch/cifar10"),
        ("hfds/owner/name:train", "hfds/owner/name:train"),
        ("hf-hub:owner/name@main", "hf-hub:owner/name@main"),
        ("read /home/me/a.png, then C:\\me\\b.png: broken", "read a.png, then b.png: broken"),
        ("macs=0.5 images/s 1/2 and/or https://host/a/b", "macs=0.5 images/s 1/2 and/or https://host/a/b"),
        ("stages.0.blocks.1", "stages.0.blocks.1"),
        ("digits", "digits"),
    ],
)
def test_places_are_cut_from_what_is_published(text, left):
    assert public(text) == left
    assert public({text: (text,)}) == {left: [left]}


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A home whose name is a secret, with images, weights, a class map and a method."""
    home = tmp_path / LEAVING
    for split, each in (("train", 4), ("test", 2)):
        pictures(home / "images" / split, each)
    torch.manual_seed(0)
    for name in ("weights", "teacher"):
        save_file(timm.create_model("test_vit", num_classes=CLASSES, **TINY).state_dict(), home / f"{name}.safetensors")
    (home / "classes.txt").write_text("".join(f"class{n}\n" for n in range(CLASSES)))
    lines = ["from vitrim.methods.magnitude import Method as Base", "class Method(Base):", "    note: str = ''"]
    more = ["    storage: str = ''", "    windows: str = ''", "    token: str = ''"]
    (home / "method.py").write_text("\n".join([*lines, *more]) + "\n")
    return home


def test_nothing_that_leaves_holds_a_secret(planted, call, tmp_path):  # noqa: F811
    model = '{"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 4, %s}'
    overlay = (
        model % f'"pretrained_cfg_overlay": {{"file": "{planted}/overlay.pth", "url": "https://u:{PASSWORD}@h/w"}}'
    )
    asked = [
        ("model.arguments", overlay),
        ("method.note", f"file://{planted}/note.txt"),
        ("method.windows", rf"C:\Users\{LEAVING}\w.pth"),
        ("method.token", TOKEN),
        ("method.storage", f"postgresql://me:{PASSWORD}@host/trials?sslpassword={PASSWORD}"),
        ("data.class_map", planted / "classes.txt"),
        ("teacher", f'{{"name": "test_vit", "weights": "{planted}/teacher.safetensors", "arguments": {overlay}}}'),
        ("train.batch", 4),
        ("measure.latency", "false"),
        ("device", "cpu"),
    ]
    settings = [part for key, value in asked for part in ("--set", f"{key}={value}")]
    out, pushed = tmp_path / "run", tmp_path / "pushed"
    code, text, error = call(
        "compress", "test_vit", "--weights", planted / "weights.safetensors", "--data", planted / "images" / "train",
        "--test", planted / "images" / "test", "--method", planted / "method.py", "--budget", "macs=0.7",
        "--epochs", 1, "--out", out, *settings,
    )  # fmt: skip
    assert code == 0, error
    assert PASSWORD not in text + error
    assert TOKEN not in text + error
    recipe = read_toml(out / "recipe.toml")
    assert recipe["method"]["storage"] == "postgresql://***@host/trials?sslpassword=***"
    for path in out.rglob("*"):
        held = b"" if path.is_dir() else path.read_bytes()
        assert PASSWORD.encode() not in held, path
        assert TOKEN.encode() not in held, path

    code, text, error = call("push", out, "owner/name", "--license", "mit", "--folder", pushed)
    assert code == 0, error
    assert sorted(path.name for path in pushed.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    for path in pushed.iterdir():
        held = path.read_bytes()
        for secret in (LEAVING, PASSWORD, TOKEN, str(tmp_path), Path.home().name + "/"):
            assert secret.encode() not in held, (path, secret)

    # The same command with the password goes on; without it, the recipe of the folder is one all the same.
    code, _, error = call("run", out / "recipe.toml", "--set", f"method.storage=postgresql://me:{PASSWORD}@host/trials"
                          f"?sslpassword={PASSWORD}")  # fmt: skip
    assert code == 0, error


def test_a_storage_without_its_password_is_asked_for(tmp_path):
    from vitrim.methods.mdc.study import open_study
    from vitrim.words.errors import RunError

    with pytest.raises(RunError, match="must be named with its password, but a recipe does not keep it"):
        open_study("postgresql://***@host/db", "mdc", {})
    with pytest.raises(RunError) as caught:
        open_study(f"postgresql+nothing://me:{PASSWORD}@host/db", "mdc", {})
    assert PASSWORD not in str(caught.value)
