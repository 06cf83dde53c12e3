"""Webdataset shards and Hugging Face datasets: splits, labels, and damage that is counted."""

import io
import json
import sys
import tarfile
import types
from pathlib import Path

import numpy as np
import pytest

import vitrim.data.hub_data as hub_module
from tests.test_data_sources import encoded, grey
from vitrim.data import Reading, find_source, open_source, split, splits_of, test_images
from vitrim.data.shards import braces
from vitrim.words.errors import DataError


def shard(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    """Write `{"000": {"png": ..., "cls": ...}}`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for kind, data in members.items():
                info = tarfile.TarInfo(f"{key}.{kind}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def samples(first: int, count: int) -> dict[str, dict[str, bytes]]:
    return {
        f"{n:04d}": {"png": encoded(n), "cls": str(n % 3).encode(), "json": json.dumps({"fine": n % 5}).encode()}
        for n in range(first, first + count)
    }


@pytest.fixture
def shards(tmp_path):
    shard(tmp_path / "things-train-000.tar", samples(0, 4))
    shard(tmp_path / "things-train-001.tar", samples(4, 3))
    shard(tmp_path / "things-val-000.tar", samples(7, 2))
    return tmp_path


def test_shards_are_read_by_number(shards):
    images = open_source(f"wds/{shards}", "train")
    assert (len(images), images.classes, images.split) == (7, 3, "train")
    assert [grey(images, n) for n in (6, 0, 3, 4)] == [6, 0, 3, 4]
    assert images.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert splits_of(f"wds/{shards}") == ("train", "validation")
    assert [grey(open_source(f"wds/{shards}:val"), n) for n in range(2)] == [7, 8]
    assert len(open_source(f"wds/{shards}:validation", "train")) == 2
    assert len(open_source(f"wds/{shards}", "test")) == 2
    named = open_source(f"wds/{shards}/things-train-{{000..001}}.tar")
    assert (len(named), named.split) == (7, None)
    with pytest.raises(DataError, match="must have a split 'tset', but the shards have train, val"):
        open_source(f"wds/{shards}:tset")
    with pytest.raises(DataError, match=r"every shard must exist, but .*things-train-002\.tar does not"):
        open_source(f"wds/{shards}/things-train-{{000..002}}.tar")


def test_training_takes_its_own_test_split(shards):
    parts = split(f"wds/{shards}", seed=0, validation=0, calibration=2)
    assert parts.test is not None
    assert (len(parts.train), len(parts.test), parts.test.split) == (7, 2, "validation")


def test_measuring_never_takes_training_images(shards):
    assert len(test_images(find_source(f"wds/{shards}"), Reading())) == 2
    (shards / "things-val-000.tar").unlink()
    with pytest.raises(DataError, match=r"must not be training images, but there is only a train split; .*:train"):
        test_images(find_source(f"wds/{shards}"), Reading())
    assert len(test_images(find_source(f"wds/{shards}:train"), Reading())) == 7


def test_names_of_shards_tell_all_splits_or_none(shards):
    shard(shards / "more.tar", samples(0, 1))
    with pytest.raises(DataError, match=r"all shards or of none must contain their split, but 'more\.tar' has none"):
        open_source(f"wds/{shards}")


def test_info_names_splits(tmp_path):
    shard(tmp_path / "a.tar", samples(0, 5))
    shard(tmp_path / "b.tar", samples(5, 2))
    info = {
        "splits": {
            "train": {"num_samples": 5, "filenames": ["a.tar"], "shard_lengths": [5], "name": "train"},
            "validation": {"num_samples": 2, "filenames": ["b.tar"], "shard_lengths": [2], "alt_label": "fine"},
        }
    }
    (tmp_path / "_info.json").write_text(json.dumps(info))
    assert open_source(f"wds/{tmp_path}").labels.tolist() == [0, 1, 2, 0, 1]
    assert open_source(f"wds/{tmp_path}:validation").labels.tolist() == [0, 1]
    info["splits"]["train"]["num_samples"] = 9
    (tmp_path / "_info.json").write_text(json.dumps(info))
    with pytest.raises(DataError, match=r"must contain the 9 samples given in _info\.json, but contain 5"):
        open_source(f"wds/{tmp_path}")
    for text in ("{", "[]", '{"splits": {"train": {"filenames": ["../x.tar"]}}}', '{"splits": {"train": {}}}'):
        (tmp_path / "_info.json").write_text(text)
        with pytest.raises(DataError, match=r"_info\.json must name"):
            open_source(f"wds/{tmp_path}")


def test_damaged_members_are_counted_and_refused_or_left_out(tmp_path):
    broken = samples(0, 6)
    broken["0001"]["png"] = broken["0001"]["png"][:40]
    broken["0004"]["png"] = b"no image"
    shard(tmp_path / "a.tar", broken)
    images = open_source(f"wds/{tmp_path}")
    with pytest.raises(DataError, match=r"a\.tar:0001\.png: .* 2 of the shard's 6 do not, here"):
        images[1]
    kept = open_source(f"wds/{tmp_path}", skip_damaged=True)
    assert [grey(kept, n) for n in range(len(kept))] == [0, 2, 3, 5]
    assert kept.labels.tolist() == [0, 2, 0, 2]
    assert "2 damaged images (first: " in kept.line()


def test_samples_that_lack_a_part_are_counted_and_refused_or_left_out(tmp_path):
    broken = samples(0, 6)
    del broken["0001"]["png"]
    del broken["0002"]["cls"]
    broken["0003"]["png"] = b""
    shard(tmp_path / "a.tar", broken)
    with pytest.raises(DataError) as caught:
        open_source(f"wds/{tmp_path}")
    for told in ("1 samples without an image", "1 samples with an empty image", "1 samples without a label"):
        assert told in str(caught.value)
    kept = open_source(f"wds/{tmp_path}", skip_damaged=True)
    assert [grey(kept, n) for n in range(len(kept))] == [0, 4, 5]


def test_truncated_shards_are_refused(tmp_path):
    path = shard(tmp_path / "a.tar", samples(0, 6))
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(DataError, match=r"a\.tar: the tar must be whole"):
        open_source(f"wds/{tmp_path}")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"cat", "must be a whole number from 0, or -1 for none, but is 'cat'; for names, give a class map"),
        (b"-100", "but is '-100'"),
        (b"0.9", "but is '0.9'"),
        (b"9" * 5000, "but is '9999"),
        (b"\xff\xfe", "a label must be text"),
    ],
)
def test_labels_of_samples(tmp_path, text, told):
    shard(tmp_path / "a.tar", {"0": {"png": encoded(1), "cls": text}})
    with pytest.raises(DataError, match=told):
        open_source(f"wds/{tmp_path}")


def test_names_of_classes_go_through_a_map(tmp_path):
    shard(tmp_path / "a.tar", {str(n): {"png": encoded(n), "cls": name} for n, name in enumerate((b"dog", b"cat"))})
    images = open_source(f"wds/{tmp_path}", class_map={"cat": 0, "dog": 2})
    assert (images.labels.tolist(), images.classes, images.names) == ([2, 0], 3, ("cat", "", "dog"))
    with pytest.raises(DataError, match="'dog' is not"):
        open_source(f"wds/{tmp_path}", class_map={"cat": 0})


def test_shards_without_labels(tmp_path):
    shard(tmp_path / "a.tar", {str(n): {"png": encoded(n)} for n in range(3)})
    images = open_source(f"wds/{tmp_path}")
    assert (images.classes, images.labels.tolist()) == (0, [-1, -1, -1])


def test_braces():
    assert braces("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert braces("{x,y}{1..2}.tar::z.tar") == ["x1.tar", "x2.tar", "y1.tar", "y2.tar", "z.tar"]
    for pattern in ("{0..999999999999}", "{0..99999999999999999999999999}" * 2 + "{0..200000}", "{0..999}{0..999}"):
        with pytest.raises(DataError, match="at most 100,000 shards"):
            braces(pattern)


# Hugging Face datasets, of which the library is not installed with vitrim.


class Rows(list):
    def __init__(self, labels) -> None:
        super().__init__(
            {"image": {"bytes": encoded(n + 1), "path": None}, "label": each} for n, each in enumerate(labels)
        )
        self.labels = labels
        self.column_names = ("image", "label")

    def __getitem__(self, key):
        return self.labels if key == "label" else super().__getitem__(key)


class Reader:
    label_key, image_key = "label", "image"
    class_to_idx = types.MappingProxyType({"no": 0, "yes": 1})

    def __init__(self, labels) -> None:
        self.dataset = Rows(labels)

    def __len__(self) -> int:
        return len(self.dataset)


@pytest.fixture
def hub(monkeypatch):
    """A dataset of the Hub as timm opens it; the names of its splits, what each holds, and what was asked for."""
    state = types.SimpleNamespace(asked=[], splits={"train": [1, 0], "valid": [0, 0, 1], "test": [-1]})

    def create(name, **given):
        state.asked.append((name, given))
        return types.SimpleNamespace(reader=Reader(state.splits[given["split"].partition("[")[0]]))

    fake = types.ModuleType("datasets")
    fake.get_dataset_split_names = lambda name: list(state.splits)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.setattr(hub_module, "create_dataset", create)
    return state


def test_hfds_names_go_to_timm(hub):
    images = open_source("hfds/someone/things", "train[:10%]")
    assert hub.asked == [("hfds/someone/things", {"split": "train[:10%]"})]
    assert (images.names, images.labels.tolist(), grey(images, 1)) == (("no", "yes"), [1, 0], 2)
    assert open_source("hfds/someone/things:train[:10%]", "test").labels.tolist() == [1, 0]


def test_hfds_take_split_names(hub):
    assert splits_of("hfds/someone/things") == ("train", "validation", "test")
    assert open_source("hfds/someone/things:validation").labels.tolist() == [0, 0, 1]
    assert hub.asked[-1][1] == {"split": "valid"}
    with pytest.raises(DataError, match="must have a split 'dev', but has train, valid, test"):
        open_source("hfds/someone/things:dev")
    mapped = open_source("hfds/someone/things", class_map={"yes": 0, "no": 2})
    assert (mapped.labels.tolist(), mapped.classes, mapped.order) == ([0, 2], 3, "map")


def test_hfds_are_measured_on_images_with_labels(hub):
    """The test images of ImageNet on the Hub have no labels."""
    assert test_images(find_source("hfds/someone/things"), Reading()).labels.tolist() == [0, 0, 1]
    hub.splits["test"] = [1]
    assert test_images(find_source("hfds/someone/things"), Reading()).labels.tolist() == [1]
    hub.splits = {"train": [0, 1]}
    with pytest.raises(DataError, match="must not be training images"):
        test_images(find_source("hfds/someone/things"), Reading())
    parts = split("hfds/someone/things", seed=0, validation=0)
    assert parts.test is None


@pytest.mark.parametrize("labels", [["no", "yes"], [0.9, 0.1], [[0, 1], [1, 0]], [0, -100]])
def test_hfds_labels_that_are_none_are_refused(hub, labels):
    hub.splits["train"] = labels
    with pytest.raises(DataError, match="every image must have one whole number as its label"):
        open_source("hfds/someone/things")


def test_hfds_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="hfds/a: its library must be installed, but"):
        open_source("hfds/a")


def test_numbers_of_test_classes_must_be_those_of_training(hub, tmp_path):
    images = open_source("hfds/someone/things")
    images.names = ("yes", "no")
    with pytest.raises(DataError, match="'no' has 0 here and 1 in hfds/someone/things"):
        split(images, "hfds/someone/things", seed=0, validation=0)
    assert np.bincount(images.labels).tolist() == [1, 1]
