"""Files from strangers: nothing in them runs code or chooses what is built; each wrong one is one sentence, soon."""

import copy
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.samples import adopted
from tests.test_cli import call, refused  # noqa: F401
from vitrim import families, report
from vitrim.data import Input
from vitrim.deploy import store
from vitrim.deploy.parent import open_parent
from vitrim.deploy.push import push
from vitrim.families import describe
from vitrim.methods.post_training.calibration import Calibration, read_calibration, write_calibration
from vitrim.nn.weights import fingerprint
from vitrim.run.recipe import overrides
from vitrim.words.errors import AdoptError, MethodError, RecipeError, RunError, SpecError, StoreError, VitrimError
from vitrim.words.parsing import DEEPEST, parse_json, parse_toml, shown, why_not_plain
from vitrim.words.plain import dump, read_json
from vitrim.words.plan import Plan, read_plan, write_plan

DEEP = "[" * 100_000 + "]" * 100_000
LONG = "9" * 5000
SOON = 5.0
"""Seconds of processor time that a refusal may take; most take milliseconds."""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A stored ViT."""
    return store.save(adopted("vit", "plain"), tmp_path / "model.safetensors", provenance={"seconds": 1.0})


def rewrite(file: Path, change: Any) -> None:
    """Store the same weights with another sheet; `change` gets its table or gives its text."""
    with safe_open(file, framework="pt") as opened:
        sheet = json.loads(opened.metadata()["vitrim"])
    text = change(sheet) or json.dumps(sheet)
    save_file(load_file(file), file, metadata={"vitrim": text})


def host(sheet: Any) -> Any:
    return sheet["spec"]["host"]


class Ran(Exception):
    """Raised where a file brought code to run."""


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s: host(s)["arguments"].update(checkpoint_path="/x.pth"), "has no field 'checkpoint_path'"),
        (lambda s: host(s)["arguments"].update(pretrained_cfg={"file": "x"}), "has no field 'pretrained_cfg'"),
        (lambda s: host(s)["arguments"].update(in_chans="3"), "host.arguments.in_chans: must be written as 3"),
        (lambda s: host(s)["arguments"].update(num_heads=10**9), "host.arguments.num_heads"),
        (lambda s: host(s)["arguments"].update(activation="os.system"), "a layer must be one that vitrim supports"),
        (
            lambda s: host(s)["arguments"]["norm"].update(name="torch.Linear"),
            "a layer must be one that vitrim supports",
        ),
        (lambda s: host(s).update(name="hf-hub:owner/name"), "host.name: must be a plain timm name"),
        (lambda s: host(s).update(name="local-dir:/models"), "host.name: must be a plain timm name"),
        (lambda s: (host(s)["arguments"].update(hybrid=True), host(s).update(name="nobody"))[2:] or None, "a hybrid"),
        (lambda s: s["spec"].update(family="os"), "a family must be one of"),
        (lambda s: s["spec"].update(family="_plain"), "a family must be one of"),
        (lambda s: s["spec"].update(family="segmentor"), "host.arguments: ARGUMENTS has no field|required"),
    ],
)
def test_a_file_chooses_nothing_that_is_built(file, change, told, monkeypatch):
    def ran(*_, **__):
        raise Ran

    monkeypatch.setattr("timm.create_model", ran)
    monkeypatch.setattr("torch.load", ran)
    rewrite(file, change)
    with pytest.raises((SpecError, StoreError), match=told):
        store.load(file)


def test_a_segmentor_in_a_segmentor_is_refused(file):
    def nest(sheet):
        inner = {"family": "segmentor", "host": dict(host(sheet)), "head": {}}
        sheet["spec"].update(family="segmentor", host={**host(sheet), "arguments": inner})

    rewrite(file, nest)
    with pytest.raises(SpecError, match="a backbone must be a classifier, but got 'segmentor'"):
        store.load(file)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda _: DEEP, f"nested at most {DEEPEST} deep"),
        (lambda s: json.dumps(s)[:-1] + ', "more": ' + LONG + "}", "at most 63 bits"),
        (lambda s: s["spec"].update(macs=int(LONG[:300])), "at most 63 bits"),
        (lambda s: s["spec"]["stages"][0]["blocks"][0]["mixer"].update(v=[1e29] * 3), "mixer"),
        (lambda s: s["spec"]["stages"][0]["blocks"].extend(s["spec"]["stages"][0]["blocks"] * 7000), "1024 items"),
        (lambda s: s["spec"]["stages"][0].update(width=2**20), "fit the spec"),
        (lambda s: (s["spec"].update(image=[2**20] * 2), s["spec"]["stages"][0].update(grid=[2**17] * 2))[2:] or None,
         "fit the spec|must build|must be"),
    ],
)  # fmt: skip
def test_an_absurd_spec_is_refused_soon(file, change, told):
    rewrite(file, change)
    start = time.process_time()
    with pytest.raises(VitrimError, match=told):
        store.load(file)
    assert time.process_time() - start < SOON


def test_a_swin_whose_masks_fill_the_memory_is_refused(tmp_path):
    file = store.save(adopted("swin", "windows"), tmp_path / "model.safetensors")

    def widen(sheet):
        sheet["spec"].update(image=[2**18, 2**18])
        for index, stage in enumerate(sheet["spec"]["stages"]):
            stage["grid"] = [2 ** (16 - index)] * 2

    rewrite(file, widen)
    start = time.process_time()
    with pytest.raises((StoreError, SpecError), match=r"must take at most|must build"):
        store.load(file)
    assert time.process_time() - start < SOON


@pytest.mark.parametrize("text", [DEEP, LONG, f"[{LONG}]", '{"a":' * 5000 + "1" + "}" * 5000, "\x00", "", "[1,"])
def test_json_and_toml_are_bounded(text, tmp_path):
    for parse in (parse_json, parse_toml):
        with pytest.raises(RunError, match=r"^here: [^\n]{1,300}$"):
            parse(text if parse is parse_json else f"a = {text}", RunError, "here")
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(VitrimError):
        read_plan(tmp_path / "plan.json")


def test_hexadecimal_numbers_of_toml_are_bounded():
    with pytest.raises(RunError, match="at most 63 bits, but one has 40,000"):
        parse_toml(f"a = 0x{'f' * 10_000}", RunError, "here")
    assert shown(16**10_000) == "a number of 40,001 bits"
    assert why_not_plain({"a": [1, 2.5, None, True, {"b": 2**63 - 1}]}) is None


def test_devices_and_pipes_are_no_text():
    with pytest.raises(RunError, match="but is a folder, a pipe or a device"):
        read_json(Path("/dev/zero"), RunError)


@pytest.mark.parametrize("value", [DEEP, LONG, "[" * 90 + "]" * 90])
def test_settings_are_bounded(value):
    with pytest.raises(RecipeError, match="seed: "):
        overrides([f"seed={value}"])


def test_a_name_of_ten_megabytes_is_refused_soon(call):  # noqa: F811
    start = time.process_time()
    for name in ("vit_tiny" * 1_300_000, "a/" * 5_000_000):
        with pytest.raises(RecipeError, match=r"^.{1,400}$"):
            open_parent(name)
    assert time.process_time() - start < SOON
    refused(call("evaluate", "test_vit", "--random-weights", "--data", "d" * 300), "a source must exist, but this one")
    refused(
        call("search", "vit_tiny", "--storage", "sqlite://", "--set", "method=taylor"),
        "method: must be a table, such as method.name='mdc', but got 'taylor'",
    )


def test_push_reads_only_tables(file, tmp_path):
    for given in ([1, 2], "text", {"recipe": "text"}, {"recipe": {"model": "text", "data": [1]}}):
        rewrite(file, lambda sheet, given=given: sheet["provenance"].update(given=given))
        with pytest.raises(StoreError, match="the license of the parent's weights must be known"):
            push(file, "owner/name", folder=tmp_path / "pushed")
        assert store.given(file) == (given if isinstance(given, dict) else {})


def calibration(**changes: Any) -> Calibration:
    model = copy.deepcopy(adopted("vit", "plain")).float()
    spec = describe(model)
    losses = {"stages.0.blocks.0.hidden": (0.1, 0.2, 0.9), "stages.0.blocks.1.heads": (0.1, 0.2, 0.3, 0.9)}
    shares = {"stages.0.blocks.0.hidden": (0.25, 0.5, 1.0), "stages.0.blocks.1.heads": (1.0,) * 4}
    known = {"losses": losses, "shares": shares, "merges": ((0, 0, 0),), "merged": (0.0,)} | changes
    return Calibration(spec=spec, weights=fingerprint(model), input=Input.of(model), count=4, **known)


NAME = "stages.0.blocks.0.hidden"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, None),
        ({"losses": {NAME: (0.1, 0.2)}, "shares": {NAME: (0.5,)}}, "2 losses and 1 shares"),
        ({"losses": {NAME: (0.1, 0.2)}, "shares": {NAME: (0.0, 1.0)}}, "must rise within 0 and 1"),
        ({"losses": {NAME: (0.1, 0.2)}, "shares": {NAME: (0.5, float("inf"))}}, "must rise within 0 and 1"),
        ({"losses": {NAME: (0.1, float("inf"))}, "shares": {NAME: (0.5, 1.0)}}, "losses must be finite"),
        ({"losses": {"stages.0.blocks.9.v": (0.1,)}, "shares": {"stages.0.blocks.9.v": (0.5,)}}, "cuts of the model"),
        ({"merged": (0.0, 1.0)}, "2 for 1 schedules"),
        ({"merged": (float("nan"),)}, "must be finite"),
        ({"merges": ((0, 0),)}, "of the 3 blocks of the model"),
    ],
)
def test_a_calibration_of_losses_that_cannot_be(changes, told, tmp_path):
    write_calibration(tmp_path / "c.safetensors", calibration(**changes))
    if told is None:
        read_calibration(tmp_path / "c.safetensors")
        return
    with pytest.raises(MethodError, match=told):
        read_calibration(tmp_path / "c.safetensors")


ABSURD = [
    {"stage": "train", "event": "step", "step": 10**18, "loss": 1e308, "top1": -1e300},
    {"stage": "train", "event": "step", "step": -5, "loss": 1e18, "task": 1e-320},
    {"stage": ["a"], "event": 3, "step": "x", "loss": "y", "epoch": None},
    {"stage": "train", "event": "epoch", "step": 1e17, "loss": True, "top1": 1e18},
]


def test_a_report_of_absurd_values(tmp_path):
    spec = describe(adopted("vit", "plain"))
    write_plan(tmp_path / "plan.json", spec, Plan.keep(spec))
    for name in ("log.jsonl", "trials.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in ABSURD))
    odd = {"macs": 1e300, "params": -1, "top1": 1e17, "latency_ratio": 1e18, "warnings": 5, "batch": "x"}
    (tmp_path / "measured.json").write_text(json.dumps(odd))
    assert report.html([tmp_path]).startswith("<!DOCTYPE html>")
    assert report.markdown([tmp_path])
    assert report.csv([tmp_path])
    (tmp_path / "log.jsonl").write_text('{"loss": ' + LONG + "}\n{}\n")
    with pytest.raises(RunError, match=r"log.jsonl: line 1: whole numbers"):
        report.html([tmp_path])


def test_weights_whose_logits_overflow():
    model = families.get("vit").example()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e18)
    with pytest.raises(AdoptError, match="logits must be finite to be compared"):
        families.adopt(model)


def test_what_is_published_of_timm_names_no_file(file):
    model: Any = copy.deepcopy(adopted("vit", "plain"))
    model.pretrained_cfg = {
        "architecture": "vit",
        "file": "/home/me/w.pth",
        "url": "https://me:word@host/w",
        "mean": (1,),
    }
    try:
        known = dump(describe(model).host)["pretrained"]
    finally:
        del model.pretrained_cfg
    assert known == {"architecture": "vit", "url": "https://***@host/w", "mean": [1]}
