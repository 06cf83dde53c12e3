"""Sources, splits and the errors of bad data."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from timm.data import ImageNetInfo

import vitrim.data.hub_data as hub_module
from vitrim.data import Images, check_classes, open_source, split, splits_of
from vitrim.words.errors import DataError


def picture(value: int, size: tuple[int, int] = (12, 10)) -> Image.Image:
    return Image.fromarray(np.full((size[1], size[0], 3), value, np.uint8))


def encoded(value: int) -> bytes:
    stream = io.BytesIO()
    picture(value).save(stream, "png")
    return stream.getvalue()


def fill(root: Path, names: dict[str, int]) -> Path:
    """Write `{"a/x.png": 7}` as pictures of grey 7."""
    for name, value in names.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(value))
    return root


def pack(root: Path, names: dict[str, int], folders: tuple[str, ...] = ()) -> Path:
    with tarfile.open(root, "w") as tar:
        for name in folders:
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE
            tar.addfile(info)
        for name, value in names.items():
            data = encoded(value)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return root


TREE = {"cat/1.png": 10, "cat/2.png": 20, "dog/1.png": 30, "eel/1.png": 40}
DIVIDED = {
    "train/cat/1.png": 10,
    "train/dog/1.png": 20,
    "train/eel/1.png": 25,
    "val/dog/1.png": 30,
    "val/eel/1.png": 40,
}


def grey(images: Images, index: int) -> int:
    return images[index][0].getpixel((0, 0))[0]


def both(tmp_path: Path, names: dict[str, int]) -> list[str]:
    return [str(fill(tmp_path / "folder", names)), str(pack(tmp_path / "pack.tar", names))]


def test_digits_are_split_the_same_way_always():
    train, test = open_source("digits"), open_source("digits", "test")
    assert (len(train), len(test)) == (1347, 450)
    assert train.classes == 10
    assert train.names == tuple("0123456789")
    image, label = train[0]
    assert (image.mode, image.size) == ("RGB", (32, 32))
    assert 0 <= label < 10
    assert np.bincount(test.labels).min() >= 43
    assert splits_of("digits") == ("train", "test")


def test_folder_and_tar_agree(tmp_path):
    for source in both(tmp_path, TREE):
        images = open_source(source)
        assert (len(images), images.classes, images.names) == (4, 3, ("cat", "dog", "eel"))
        assert [grey(images, i) for i in range(4)] == [10, 20, 30, 40]
        assert images.labels.tolist() == [0, 0, 1, 2]
        assert len(open_source(source, "train")) == 4
        assert splits_of(source) == ()


def test_divided_sources_count_classes_over_all_splits(tmp_path):
    for source in both(tmp_path, DIVIDED):
        assert splits_of(source) == ("train", "validation")
        train, test = open_source(source), open_source(source, "test")
        assert (len(train), train.split) == (3, "train")
        assert (len(test), test.split) == (2, "validation")
        # No cat in val: dog and eel keep their numbers.
        assert test.labels.tolist() == [1, 2]
        assert grey(test, 0) == 30


def test_a_class_may_be_called_train(tmp_path):
    images = open_source(str(fill(tmp_path, {"bus/1.png": 1, "train/1.png": 2})))
    assert images.names == ("bus", "train")


def test_pictures_without_class_folders_have_no_labels(tmp_path):
    for source in both(tmp_path, {"1.png": 1, "2.png": 2}):
        images = open_source(source)
        assert (images.classes, images.names, images.labels.tolist()) == (0, None, [-1, -1])
        check_classes(images, 17)


def test_imagenet_names_find_their_labels(tmp_path):
    wnids = ImageNetInfo("imagenet-1k").label_names()
    names = {f"{wnids[700]}/1.png": 1, f"{wnids[3]}/1.png": 2}
    for source in both(tmp_path, names):
        images = open_source(source, classes=1000)
        assert (images.classes, sorted(images.labels.tolist())) == (1000, [3, 700])
        assert images.names is not None
        assert images.names[700] == wnids[700]
        assert open_source(source, classes=2).classes == 2


def test_class_maps(tmp_path):
    source = str(fill(tmp_path / "data", TREE))
    path = tmp_path / "map.txt"
    path.write_text("eel\ndog\ncow\ncat\n")
    images = open_source(source, class_map=str(path))
    assert (images.classes, images.labels.tolist()) == (4, [3, 3, 1, 0])
    assert open_source(source, class_map={"cat": 0, "dog": 1, "eel": 1}).labels.tolist() == [0, 0, 1, 1]
    with pytest.raises(DataError, match="every class must be in the class map, but 'dog' is not"):
        open_source(source, class_map={"cat": 0, "eel": 1})
    with pytest.raises(DataError, match="class map must exist"):
        open_source(source, class_map="nowhere.txt")
    (tmp_path / "map.pkl").write_bytes(b"")
    with pytest.raises(DataError, match=r"must be a \.txt"):
        open_source(source, class_map=str(tmp_path / "map.pkl"))


def test_unknown_sources_suggest_the_near_one(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(DataError, match=r"did you mean '.*photos'\?"):
        open_source(str(tmp_path / "fotos"))
    with pytest.raises(DataError, match=r"did you mean 'digits'\?"):
        open_source("digit")
    with pytest.raises(DataError, match="must have at least one image"):
        open_source(str(tmp_path / "photos"))
    (tmp_path / "x.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"folder or an uncompressed \.tar"):
        open_source(str(tmp_path / "x.zip"))


def test_no_such_split(tmp_path):
    source = str(fill(tmp_path, TREE))
    with pytest.raises(DataError, match="not divided"):
        open_source(source, "test")
    with pytest.raises(DataError, match="must be one of train, validation, test, but is 'tset'"):
        open_source(source, "tset")
    with pytest.raises(DataError, match="train or test"):
        open_source("digits", "validation")


def test_empty_classes_are_named(tmp_path):
    folder = fill(tmp_path / "folder", TREE)
    (folder / "fox").mkdir()
    with pytest.raises(DataError, match="every class folder must contain an image, but 'fox' is empty"):
        open_source(str(folder))
    tar = pack(tmp_path / "pack.tar", TREE, folders=("cat", "fox"))
    with pytest.raises(DataError, match="'fox' is empty"):
        open_source(str(tar))


def test_pictures_beside_class_folders_are_named(tmp_path):
    with pytest.raises(DataError, match=r"every image must be in a class folder, but 'stray\.png' is not"):
        open_source(str(fill(tmp_path, TREE | {"stray.png": 1})))


def test_damaged_pictures_are_named(tmp_path):
    folder = fill(tmp_path / "folder", TREE)
    good = (folder / "cat/1.png").read_bytes()
    (folder / "cat/1.png").write_bytes(good[: len(good) // 2])
    (folder / "cat/2.png").write_bytes(b"no picture")
    images = open_source(str(folder))
    with pytest.raises(DataError, match=r"cat/1\.png: every image must decode"):
        images[0]
    with pytest.raises(DataError, match=r"cat/2\.png: .* not an image that Pillow can read"):
        images[1]
    (folder / "dog/1.png").unlink()
    with pytest.raises(DataError, match=r"dog/1\.png: every image must be readable"):
        images[2]


@pytest.mark.parametrize("cut", [100, 512, 600, 1500, 3600, 4096])
def test_truncated_tars_are_refused(tmp_path, cut):
    whole = pack(tmp_path / "whole.tar", TREE).read_bytes()
    broken = tmp_path / "broken.tar"
    broken.write_bytes(whole[:cut])
    with pytest.raises(DataError, match="the tar must be whole"):
        open_source(str(broken))


def test_damaged_tars_are_refused(tmp_path):
    broken = tmp_path / "broken.tar"
    broken.write_bytes(b"\x07" * 4096)
    with pytest.raises(DataError, match="the tar must be whole"):
        open_source(str(broken))


def test_tars_of_tars(tmp_path):
    inner = pack(tmp_path / "cat.tar", {"1.png": 5}).read_bytes()
    with tarfile.open(tmp_path / "outer.tar", "w") as tar:
        for name in ("cat.tar", "dog.tar"):
            info = tarfile.TarInfo(name)
            info.size = len(inner)
            tar.addfile(info, io.BytesIO(inner))
    images = open_source(str(tmp_path / "outer.tar"))
    assert (len(images), images.names, grey(images, 1)) == (2, ("cat", "dog"), 5)


def test_class_counts_must_match(tmp_path):
    images = open_source(str(fill(tmp_path, TREE)))
    check_classes(images, 3)
    with pytest.raises(DataError, match="must have the 5 classes of the model, but has 3"):
        check_classes(images, 5)


class FakeTorch:
    classes = ("zero", "one")
    targets = (1, 0, 1)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return picture(index), self.targets[index]

    def __len__(self) -> int:
        return 3


def test_torch_names_go_to_timm(monkeypatch):
    asked = []
    monkeypatch.setattr(hub_module, "create_dataset", lambda name, **k: asked.append((name, k)) or FakeTorch())
    monkeypatch.setenv("VITRIM_DATA", "somewhere")
    images = open_source("torch/cifar10", "test")
    assert asked == [("torch/cifar10", {"root": "somewhere", "split": "validation", "download": True})]
    assert (images.names, images.labels.tolist(), grey(images, 2)) == (("zero", "one"), [1, 0, 1], 2)
    open_source("torch/cifar10")
    assert asked[1][1]["split"] == "train"
    with pytest.raises(DataError, match="a class map must be used with"):
        open_source("torch/cifar10", class_map={"a": 0})


def test_unknown_torchvision_sets_are_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("VITRIM_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"torch/cifar11: timm must be able to open this source, but Unknown"):
        open_source("torch/cifar11")


def test_splits_are_disjoint_balanced_and_repeat():
    one, two = split("digits", seed=3), split("digits", seed=3)
    assert one.validation is not None
    assert one.calibration is not None
    assert one.test is not None
    assert (len(one.train), len(one.calibration), len(one.validation), len(one.test)) == (1212, 256, 135, 450)
    train, held, seen = (set(part._index.tolist()) for part in (one.train, one.validation, one.calibration))
    assert not train & held
    assert seen <= train
    assert not (train | held) & set(one.test._index.tolist())
    for part in (one.calibration, one.validation):
        counts = np.bincount(part.labels)
        assert counts.max() - counts.min() <= 1
    assert two.validation is not None
    assert two.validation._index.tolist() == one.validation._index.tolist()
    other = split("digits", seed=4)
    assert other.validation is not None
    assert other.validation._index.tolist() != one.validation._index.tolist()


def test_uneven_classes_are_held_out_evenly():
    labels = [0] * 50 + [1] * 10 + [2] * 10
    images = Images(lambda index: picture(index), labels, classes=3)
    parts = split(images, calibration=9, validation=9, seed=0)
    assert parts.validation is not None
    assert parts.calibration is not None
    assert np.bincount(parts.validation.labels).tolist() == [3, 3, 3]
    assert np.bincount(parts.calibration.labels).tolist() == [3, 3, 3]


def test_one_picture_a_class():
    images = Images(lambda index: picture(index), range(20), classes=20)
    parts = split(images, seed=0)
    assert parts.validation is None
    assert len(parts.train) == 20
    assert parts.calibration is not None
    assert len(parts.calibration) == 20
    taken = split(images, validation=5, seed=0)
    assert taken.validation is not None
    assert (len(taken.train), len(taken.validation)) == (15, 5)
    with pytest.raises(DataError, match="must leave images to train on, but takes 20 of 20"):
        split(images, validation=20, seed=0)
    with pytest.raises(DataError, match="at least 0"):
        split(images, calibration=-1, seed=0)


def test_unlabelled_sources_are_split_too(tmp_path):
    parts = split(str(fill(tmp_path, {f"{n}.png": n for n in range(10)})), calibration=4, validation=0.2, seed=0)
    assert parts.validation is not None
    assert parts.calibration is not None
    assert (len(parts.train), len(parts.validation), len(parts.calibration), parts.test) == (8, 2, 4, None)


def test_test_sources(tmp_path):
    divided = str(fill(tmp_path / "divided", DIVIDED))
    own = split(divided, validation=0, seed=0)
    assert own.test is not None
    assert own.test.labels.tolist() == [1, 2]
    alone = str(fill(tmp_path / "alone", TREE))
    assert split(alone, validation=0, seed=0).test is None
    given = split(alone, str(fill(tmp_path / "few", {"eel/1.png": 1})), validation=0, seed=0)
    assert given.test is not None
    # The test folder has one class of the three; it keeps its number.
    assert (given.test.labels.tolist(), given.test.classes) == ([2], 3)
    with pytest.raises(DataError, match="'yak' is not"):
        split(alone, str(fill(tmp_path / "alien", {"yak/1.png": 1})), seed=0)


def test_labels_must_fit():
    with pytest.raises(DataError, match="labels must be below 2"):
        Images(lambda index: picture(0), [0, 2], classes=2)
    with pytest.raises(DataError, match="at least one image"):
        Images(lambda index: picture(0), [], classes=2)
