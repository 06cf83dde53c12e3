"""What is read of a folder or tar, what is left out and told, and what is refused."""

import io
import os
import random
import struct
import tarfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from timm.data import create_dataset
from timm.utils.misc import natural_key as timm_key
from torchvision.datasets.folder import default_loader

from tests.test_data_sources import DIVIDED, TREE, both, encoded, fill, grey
from vitrim.data import Images, find_source, open_source, split, splits_of
from vitrim.data.decode import readable_endings
from vitrim.data.listing import list_folder
from vitrim.data.names import Names, natural_key, sort_classes
from vitrim.words.errors import DataError

PLAIN = {"class_order": "plain"}


def left_out(images: Images) -> str:
    return "; ".join(images.left_out)


# Order.


def test_natural_order_is_that_of_timm():
    names = [
        "10",
        "9",
        "1",
        "2",
        "apple",
        "Zebra",
        "bird",
        "Cat",
        "a10b2",
        "a9b10",
        "a",
        "a-",
        "a1",
        "n01",
        "n1x",
        "x٣",
    ]
    names += ["".join(random.Random(seed).choices("aB1/.-09 ", k=6)) for seed in range(500)]
    assert sorted(names, key=natural_key) == sorted(names, key=timm_key)
    assert natural_key("9" * 5000) > natural_key("8")
    # A character that is a digit to Python and no number is an error in timm.
    assert sort_classes(["1²2", "1"], "natural") == ["1", "1²2"]


def test_files_come_in_the_order_of_timm(tmp_path):
    draw = random.Random(0)
    names = {"".join(draw.choices("aB10-._", k=5)) + ".png": 1 for _ in range(300)}
    names = {f"{draw.choice(['c1', 'c10', 'C2', 'c-', 'c'])}/{name}": 1 for name in names if not name.startswith(".")}
    fill(tmp_path, names)
    samples = create_dataset("", root=str(tmp_path), search_split=False).reader.samples
    mine = list_folder(tmp_path).names
    assert [mine[n] for n in range(len(mine))] == [os.path.relpath(path, tmp_path) for path, _ in samples]


@pytest.mark.parametrize(
    ("names", "plain", "natural"),
    [
        ("10 9 1 2", "1 10 2 9", "1 2 9 10"),
        ("apple Zebra bird Cat", "Cat Zebra apple bird", "apple bird Cat Zebra"),
    ],
)
def test_both_orders_of_classes(tmp_path, names, plain, natural):
    for source in both(tmp_path, {f"{name}/1.png": n for n, name in enumerate(names.split())}):
        assert open_source(source, class_order="plain").names == tuple(plain.split())
        images = open_source(source, class_order="natural")
        assert (images.names, images.order) == (tuple(natural.split()), "natural")
        # Nobody to ask: refused, naming both.
        with pytest.raises(DataError) as caught:
            open_source(source)
        for word in (f"0 '{plain.split()[0]}'", f"0 '{natural.split()[0]}'", "data.class_order", "data.class_map"):
            assert word in str(caught.value)
        assert open_source(source, ask=lambda _: "natural").names == images.names
        assert open_source(source, class_map={n: k for k, n in enumerate(names.split())}).order == "map"
        with pytest.raises(DataError, match="must be auto, plain or natural, but is 'timm'"):
            open_source(source, class_order="timm")


# Splits.


@pytest.mark.parametrize(
    "beside",
    [
        {"backup/cat/1.png": 90, "__MACOSX/cat/._1.png": 91, "docs/figure.png": 92},
        {"docs/figure.png": 92},
        {"logo.png": 92},
    ],
)
def test_what_lies_beside_the_splits_is_left_out_and_told(tmp_path, beside):
    for source in both(tmp_path, DIVIDED | beside):
        train, test = open_source(source, "train"), open_source(source, "test")
        assert splits_of(source) == ("train", "validation")
        assert [grey(train, n) for n in range(len(train))] == [10, 20, 25]
        assert [grey(test, n) for n in range(len(test))] == [30, 40]
        assert train.names == ("cat", "dog", "eel")
        name = next(iter(beside)).split("/")[0]
        assert "images next to the split folders" in left_out(train)
        assert (f"{name}/" if "/" in next(iter(beside)) else "no folder") in left_out(train)


def test_a_split_or_a_class(tmp_path):
    lone = {"train/cat/1.png": 1, "train/dog/1.png": 2}
    one = open_source(str(fill(tmp_path / "one", lone | {"docs/figure.png": 3})))
    assert (one.split, one.names, "docs/" in left_out(one)) == ("train", ("cat", "dog"), True)
    with pytest.raises(DataError, match="'train' must be a split or a class, but may be either next to 'backup'"):
        open_source(str(fill(tmp_path / "two", lone | {"backup/cat/1.png": 3})))
    with pytest.raises(DataError, match="a split must have one folder, but val and valid are both validation"):
        open_source(str(fill(tmp_path / "three", DIVIDED | {"valid/cat/1.png": 1})))
    wrapped = open_source(str(fill(tmp_path / "four", {f"all/{name}": v for name, v in DIVIDED.items()})), "test")
    assert [grey(wrapped, n) for n in range(len(wrapped))] == [30, 40]


def test_splits_below_classes_are_refused(tmp_path):
    names = {"cat/train/1.png": 1, "cat/test/1.png": 2, "dog/train/1.png": 3}
    for depth in (None, 1, 2):
        with pytest.raises(DataError, match="splits must be above classes, as in train/cat"):
            open_source(str(fill(tmp_path, names)), depth=depth)


# Levels.


DEEP = {"dog/terrier/1.png": 1, "dog/poodle/1.png": 2, "cat/siamese/1.png": 3}


def test_classes_in_two_levels_are_asked_for(tmp_path):
    for source in both(tmp_path, DEEP):
        with pytest.raises(DataError) as caught:
            open_source(source)
        text = str(caught.value)
        assert "data.depth=1 gives 2 classes (cat, dog)" in text
        assert "data.depth=2 gives 3 classes (poodle, siamese, terrier)" in text
        assert open_source(source, depth=1).names == ("cat", "dog")
        assert open_source(source, depth=2).names == ("poodle", "siamese", "terrier")
        with pytest.raises(DataError, match=r"must be in 3 folders, as set by data\.depth"):
            open_source(source, depth=3)


def test_levels_that_differ_are_asked_for(tmp_path):
    source = str(fill(tmp_path, TREE | {"dog/old/1.png": 1}))
    with pytest.raises(DataError, match=r"'dog/old' has 2 levels of folders and 'cat' has 1; data\.depth=1 gives 3 "):
        open_source(source)
    assert open_source(source, depth=1).labels.tolist() == [0, 0, 1, 1, 2]


def test_one_folder_around_all_classes_is_no_class(tmp_path):
    for source in both(tmp_path, {f"images/{name}": value for name, value in TREE.items()}):
        assert open_source(source).names == ("cat", "dog", "eel")


# Files.


def test_images_of_every_ending_are_read(tmp_path):
    made = {
        "1.webp": "webp", "2.bmp": "bmp", "3.gif": "gif", "4.tif": "tiff", "5.jfif": "jpeg", "6.avif": "avif",
        "7.JPG": "jpeg", "8.ppm": "ppm",
    }  # fmt: skip
    (tmp_path / "cat").mkdir()
    for name, kind in made.items():
        Image.new("RGB", (8, 8), (120, 120, 120)).save(tmp_path / "cat" / name, kind)
    images = open_source(str(tmp_path))
    assert len(images) == len(made)
    assert all(abs(grey(images, n) - 120) < 6 for n in range(len(images)))


def test_images_that_pillow_lacks_are_counted_and_named(tmp_path, monkeypatch):
    fill(tmp_path, TREE)
    for name in ("1.heic", "2.heic", "3.avif"):
        (tmp_path / "cat" / name).write_bytes(b"x")
    (tmp_path / "cat" / "notes.txt").touch()
    (tmp_path / "cat" / "README").touch()
    monkeypatch.setattr("vitrim.data.decode.readable_endings", lambda: readable_endings() - {".avif"})
    images = open_source(str(tmp_path))
    assert len(images) == 4
    assert "3 images that this Pillow cannot read (.heic 2, .avif 1; first: cat/" in left_out(images)
    assert "2 files that are no images by their names (" in left_out(images)
    assert left_out(images) in images.line()


def test_a_class_of_which_nothing_can_be_read_is_refused(tmp_path):
    fill(tmp_path, TREE)
    (tmp_path / "fox").mkdir()
    (tmp_path / "fox" / "1.heic").touch()
    with pytest.raises(DataError, match="'fox' contains none that can be read"):
        open_source(str(tmp_path))


def test_service_files_are_left_out(tmp_path):
    extra = {".ipynb_checkpoints/cat-checkpoint.png": 9, "cat/._1.png": 9, "cat/.ipynb_checkpoints/1-checkpoint.png": 9,
             "@eaDir/1.png": 9, "__MACOSX/cat/._1.png": 9}  # fmt: skip
    for source in both(tmp_path, TREE | extra):
        images = open_source(source)
        assert images.names == ("cat", "dog", "eel")
        assert [grey(images, n) for n in range(len(images))] == [10, 20, 30, 40]
        assert "hidden or service files" in left_out(images)


def twelve_bits(values: np.ndarray) -> bytes:
    """An uncompressed grey TIFF of 12 bits a value, two values in three bytes; Pillow reads such and writes none."""
    pairs = values.reshape(-1, 2).astype(np.uint32)
    packed = (pairs[:, 0] << 12) | pairs[:, 1]
    data = b"".join(int(each).to_bytes(3, "big") for each in packed)
    height, width = values.shape
    tags = {256: width, 257: height, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(data)}
    fields = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    data += bytes(len(data) % 2)
    return struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + struct.pack("<H", len(tags)) + fields + bytes(4)


@pytest.mark.parametrize("bits", [16, 12])
def test_grey_of_more_than_eight_bits_is_scaled(tmp_path, bits):
    most = 2**bits - 1
    values = np.linspace(0, most, 64).reshape(8, 8).round().astype(np.uint16)
    (tmp_path / "cat").mkdir()
    if bits == 16:
        Image.fromarray(values).save(tmp_path / "cat" / "1.png")
    else:
        (tmp_path / "cat" / "1.tif").write_bytes(twelve_bits(values))
    image, _ = open_source(str(tmp_path))[0]
    assert np.abs(np.asarray(image)[..., 0].astype(float) - 255 / most * values).max() <= 0.51
    assert image.mode == "RGB"


def test_values_without_a_range_are_refused(tmp_path):
    (tmp_path / "cat").mkdir()
    Image.fromarray(np.linspace(0, 9, 64, dtype=np.float32).reshape(8, 8)).save(tmp_path / "cat" / "1.tif")
    with pytest.raises(DataError, match=r"1\.tif: every image must decode, but its mode 'F' has no agreed range"):
        open_source(str(tmp_path))[0]


def test_orientation_is_read_as_torchvision_does(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "cat").mkdir()
    path = tmp_path / "cat" / "1.jpg"
    Image.fromarray(np.arange(12 * 20 * 3, dtype=np.uint8).reshape(12, 20, 3)).save(path, exif=exif)
    image, _ = open_source(str(tmp_path))[0]
    assert image.size == (20, 12)
    assert image.tobytes() == default_loader(path).tobytes()


# Class maps.


def test_marks_and_blank_lines_in_class_maps(tmp_path):
    source = str(fill(tmp_path / "data", TREE))
    path = tmp_path / "map.txt"
    path.write_bytes(b"\xef\xbb\xbfeel\r\ndog\r\ncat\r\n\r\n \n")
    images = open_source(source, class_map=str(path))
    assert (images.names, images.classes, images.labels.tolist()) == (("eel", "dog", "cat"), 3, [2, 2, 1, 0])
    for text, told in (
        ("cat\n\ndog\neel\n", "line 2 is blank"),
        ("cat\ndog\ncat\neel\n", "'cat' has lines 1 and 3"),
        ("\n\n", "is empty"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=told):
            open_source(source, class_map=str(path))
    path.write_bytes(b"caf\xe9\n")
    with pytest.raises(DataError, match="must be UTF-8"):
        open_source(source, class_map=str(path))
    with pytest.raises(DataError, match="must exist and be a file"):
        open_source(source, class_map="x" * 300)
    for number in (-1, 1.5, True, "1"):
        with pytest.raises(DataError, match="'cat' must have a whole number"):
            open_source(source, class_map={"cat": number})


# Links, pipes, and tars of all kinds.


def test_links_are_followed_once(tmp_path):
    fill(tmp_path / "far" / "fox", {"1.png": 50, "2.png": 60})
    data = fill(tmp_path / "data", TREE)
    (data / "fox").symlink_to(tmp_path / "far" / "fox")
    (data / "cat" / "3.png").symlink_to(data / "cat" / "1.png")
    (data / "cat" / "loop").symlink_to(data)
    (data / "cat" / "self").symlink_to(data / "cat" / "self")
    (data / "ape").symlink_to(data / "cat")
    (tmp_path / "far" / "fox" / "back").symlink_to(tmp_path)
    images = open_source(str(data))
    assert images.names == ("cat", "dog", "eel", "fox")
    assert [grey(images, n) for n in range(len(images))] == [10, 20, 10, 30, 40, 50, 60]
    assert "3 links to folders that are read anyway" in left_out(images)
    assert "1 broken links" in left_out(images)


def test_thirty_images_count_as_thirty(tmp_path):
    data = fill(tmp_path, {f"c{n % 3}/{n}.png": n for n in range(30)})
    for name in ("a", "b", "c0/d"):
        (data / name).symlink_to(data)
    assert len(open_source(str(data))) == 30


def test_pipes_are_left_out(tmp_path):
    fill(tmp_path, TREE)
    os.mkfifo(tmp_path / "cat" / "pipe.png")
    images = open_source(str(tmp_path))
    assert len(images) == 4
    assert "1 pipes, sockets or devices (first: cat/pipe.png)" in left_out(images)


def test_deep_folders_are_refused(tmp_path):
    fill(tmp_path, {"/".join(["d"] * 40) + "/1.png": 1})
    with pytest.raises(DataError, match="must be nested at most 32 deep"):
        open_source(str(tmp_path))


def member(name: str, data: bytes = b"", **fields) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def write_tar(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> str:
    with tarfile.open(path, "w") as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data) if info.isreg() else None)
    return str(path)


def test_tars_with_links(tmp_path):
    good = member("cat/1.png", encoded(10))
    images = open_source(
        write_tar(
            tmp_path / "a.tar", good, member("dog/1.png", encoded(30)),
            member("cat/2.png", type=tarfile.LNKTYPE, linkname="cat/1.png"),
            member("dog/2.png", type=tarfile.SYMTYPE, linkname="../cat/1.png"),
            member("dog/3.png", type=tarfile.LNKTYPE, linkname="nowhere.png"),
            member("dog/4.png", type=tarfile.FIFOTYPE), member("dog/5.png", type=tarfile.CHRTYPE),
            member("dog/1.png", encoded(31)),
        )
    )  # fmt: skip
    assert [grey(images, n) for n in range(len(images))] == [10, 10, 31]
    replaced = "1 members that a later member of the same name replaces"
    for told in ("2 links (", "2 pipes, sockets or devices (", replaced):
        assert told in left_out(images)


def test_sizes_that_a_tar_claims_need_no_memory(tmp_path):
    path = tmp_path / "a.tar"
    write_tar(path, member("cat/1.png", encoded(10)))
    # A long name of 6 GB, in a file that is as large on paper.
    head = tarfile.TarInfo("././@LongLink")
    head.type, head.size = tarfile.GNUTYPE_LONGNAME, 6 * 2**30
    with path.open("wb") as stream:
        stream.write(head.tobuf(tarfile.GNU_FORMAT))
        stream.truncate(6 * 2**30 + 4096)
    big = tmp_path / "b.tar"
    info = tarfile.TarInfo("cat/1.png")
    info.size = 5 * 2**30
    with big.open("wb") as stream:
        stream.write(info.tobuf(tarfile.GNU_FORMAT))
        stream.truncate(5 * 2**30 + 4096)
    tracemalloc.start()
    start = time.process_time()
    for file, told in (
        (path, "the tar must be whole, but a header claims"),
        (big, "it has 5,368,709,120 bytes and at"),
    ):
        with pytest.raises(DataError, match=told):
            open_source(str(file))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**24
    assert time.process_time() - start < 20
    pax = tmp_path / "c.tar"
    info = tarfile.TarInfo("cat/1.png")
    info.pax_headers = {"size": "9" * 30}
    pax.write_bytes(info.tobuf(tarfile.PAX_FORMAT) + bytes(2048))
    with pytest.raises(DataError, match="the tar must be whole"):
        open_source(str(pax))


def test_names_that_lead_out_of_a_tar_are_names(tmp_path):
    images = open_source(
        write_tar(tmp_path / "a.tar", member("../cat/1.png", encoded(1)), member("/dog/1.png", encoded(2))), depth=1
    )
    assert len(images) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"a.tar"}


# Damage.


def test_damaged_images_may_be_left_out(tmp_path):
    folder = fill(tmp_path, TREE)
    (folder / "cat" / "1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"cat/1\.png: every image must decode.*data\.skip_damaged"):
        open_source(str(folder))[0]
    images = open_source(str(folder), skip_damaged=True)
    assert [grey(images, n) for n in range(len(images))] == [20, 30, 40]
    assert images.labels.tolist() == [0, 1, 2]
    assert "1 damaged images (first: " in left_out(images)
    for path in folder.rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match="must have an image that decodes, but none of 4 does"):
        open_source(str(folder), skip_damaged=True)


# Listing once, and in little memory.


def test_a_folder_is_listed_once(tmp_path, monkeypatch):
    seen: list[str] = []
    scan = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: seen.append(str(path)) or scan(path))
    source = str(fill(tmp_path, DIVIDED))
    parts = split(source, seed=0, calibration=2, validation=0)
    assert parts.test is not None
    assert len(seen) == len(set(seen)) == 8


def test_names_take_little_memory(tmp_path):
    names = Names()
    for number in range(10_000):
        names.append(f"n{number // 100:08d}/n{number // 100:08d}_{number}.JPEG")
    assert names[9_999] == "n00000099/n00000099_9999.JPEG"
    assert names.nbytes < 45 * len(names)
    with_byte = os.fsdecode(b"caf\xe9.png")
    names.append(with_byte)
    assert names[len(names) - 1] == with_byte


def test_names_that_are_not_utf8_are_read(tmp_path):
    folder = fill(tmp_path, TREE)
    (folder / "cat" / "1.png").rename(folder / "cat" / os.fsdecode(b"caf\xe9.png"))
    images = open_source(str(folder))
    assert sorted(grey(images, n) for n in range(len(images))) == [10, 20, 30, 40]


def test_the_line_names_images_classes_and_numbers(tmp_path):
    images = open_source(str(fill(tmp_path / "pets", TREE)))
    assert images.line() == "4 images of pets, 3 classes in plain order (0 'cat', 1 'dog', 2 'eel'); nothing left out"
    more = open_source(str(fill(tmp_path / "more", TREE | {"fox/1.png": 1, "fox/2.txt": 1})))
    assert "4 classes in plain order (0 'cat', 1 'dog', 2 'eel', ...); left out: 1 files" in more.line()
    assert "no labels; nothing left out" in open_source(str(fill(tmp_path / "bare", {"1.png": 1}))).line()


def test_a_split_may_be_named_with_the_source(tmp_path):
    source = str(fill(tmp_path, DIVIDED))
    assert open_source(f"{source}:validation").labels.tolist() == [1, 2]
    assert open_source("digits:test", "train").split == "test"
    assert find_source(f"{source}:validation").splits == ()
    with pytest.raises(DataError, match="split must be one of"):
        open_source(f"{source}:vall")
    for text in ("x" * 300, "x\0y", f"{source}/" + "y" * 5000):
        with pytest.raises(DataError, match="a source must exist"):
            open_source(text)
