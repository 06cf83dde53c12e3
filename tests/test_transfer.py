"""Segmentation transfer: heads on any backbone, scenes with masks, scores, and the run from a recipe to a report."""

import functools
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import vitrim
from tests.samples import apart, timm_model
from tests.tolerance import EXACT
from vitrim import cli, families
from vitrim.cut.observe import axes, masked
from vitrim.cut.surgery import apply
from vitrim.data import IGNORE, Input, SceneAugment, SceneLoader, open_scenes, scene_splits
from vitrim.deploy import store
from vitrim.deploy.export import export, onnx_session
from vitrim.families import describe
from vitrim.families._segmentor import segmentor
from vitrim.measure import cost, counted
from vitrim.methods.cait.masks import merge_plan
from vitrim.nn import unmerge
from vitrim.nn.segment import Head, lay_on, rounded
from vitrim.report import html, markdown
from vitrim.run.pipeline import compress
from vitrim.run.recipe import ModelRecipe
from vitrim.run.transfer import SceneTest, TransferRecipe, score, transfer
from vitrim.run.transfer.objective import PixelObjective
from vitrim.run.transfer.picture import colours, side_by_side
from vitrim.run.transfer.run import transfer as run_transfer
from vitrim.train import Distill, Task, fit, learning_rate
from vitrim.words.costs import cost_of
from vitrim.words.errors import AdoptError, DataError, RecipeError, RunError, VitrimError
from vitrim.words.plan import BlockPlan, Plan
from vitrim.words.steps.drop import Drop
from vitrim.words.steps.merge import Merge

SMALL = Head(width=32, channels=64)
FOUR = {"img_size": 64, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2)}
SIZE = (32, 48)
NAMES = ("sky", "road", "unlabelled", "car")
QUICK = {"latency": False}

pytestmark = pytest.mark.filterwarnings("ignore:torch.searchsorted|Using a non-tuple sequence:UserWarning")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def vit(merges=((1, "w"), (2, "h")), dtype=torch.float32, **arguments) -> nn.Module:
    """A tiny adopted ViT on a grid of 4 x 6, with merges whose weights are not those of the mean."""
    torch.manual_seed(3)
    known = {"img_size": SIZE, "depth": 4, **arguments}
    model = families.adopt(families.get("vit").example(**known).to(dtype).eval())
    if merges:
        model = apply(model, merge_plan(describe(model), list(merges), "linear", False))
    for name, parameter in model.named_parameters():
        if name.endswith("delta"):
            nn.init.normal_(parameter, std=0.05)
    return model.eval()


BACKBONES = {
    "dense": lambda: vit(()),
    "merged": vit,
    "distilled": lambda: vit(distilled=True),
    "map": lambda: vit(class_token=False, global_pool="map"),
    "average": lambda: vit(class_token=False, global_pool="avg"),
    "t2t": lambda: families.adopt(timm_model("t2t", "performer", torch.float32)),
    "swin": lambda: families.adopt(families.get("swin").example(**FOUR)),
}


@functools.cache
def backbone(name: str) -> nn.Module:
    """Shared between tests, so it must be left as it is."""
    torch.manual_seed(4)
    return BACKBONES[name]()


def images(model: nn.Module, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, *describe(model).image, generator=torch.Generator().manual_seed(5))


class TestSegmentor:
    @pytest.mark.parametrize(("name", "kind"), [*((name, "fpn") for name in BACKBONES), ("merged", "linear")])
    def test_is_priced_stored_and_loaded_like_any_model(self, name, kind, tmp_path):
        parent = backbone(name)
        before = {key: value.clone() for key, value in parent.state_dict().items()}
        model = segmentor(parent, 5, SMALL.model_copy(update={"kind": kind})).eval()
        x = images(model)
        with torch.no_grad():
            logits = model(x)
        assert logits.shape == (2, 5, *x.shape[2:])
        assert cost(model) == counted(model)
        assert cost(model).params == sum(p.numel() for p in model.parameters())
        again = vitrim.load(vitrim.save(model, tmp_path / "model.safetensors"))
        assert describe(again) == describe(model)
        with torch.no_grad():
            assert torch.equal(again(x), logits)
        assert all(torch.equal(value, before[key]) for key, value in parent.state_dict().items())

    @pytest.mark.parametrize("name", ["merged", "swin"])
    def test_every_parameter_is_trained(self, name):
        """Otherwise several processes would wait for gradients that never come."""
        model = segmentor(backbone(name), 3, SMALL)
        model(images(model)).square().mean().backward()
        assert [key for key, p in model.named_parameters() if p.grad is None] == []

    def test_its_blocks_are_cut_like_any_others(self):
        model = segmentor(vit(dtype=torch.float64), 3, SMALL).double().eval()
        spec, x = describe(model), images(model).double()
        plan = Plan.of(spec, [BlockPlan(hidden=tuple(range(0, block.hidden, 2))) for _, _, block in spec.blocks()])
        masks = {
            path: torch.tensor([1.0, 0.0], dtype=torch.float64).repeat(axis.size // 2)
            for path, axis in axes(model).items()
            if path.endswith("hidden")
        }
        child = apply(model, plan)
        with torch.no_grad(), masked(model, masks):
            expected = model(x)
        with torch.no_grad():
            assert apart(child(x), expected) < EXACT
        assert cost_of(describe(child)) == counted(child)
        assert describe(apply(model, Plan.of(spec, [BlockPlan()] * 4))) == spec

    @pytest.mark.parametrize("size", [SIZE, (40, 56)])
    def test_takes_another_size_and_keeps_the_place_of_everything(self, size):
        model = segmentor(vit(), 3, SMALL, size=size).eval()
        assert describe(model).image == size
        assert model(images(model, 1)).shape == (1, 3, *size)

    def test_native_and_restored_maps_agree_where_nothing_is_merged(self):
        dense = vit(())
        torch.manual_seed(0)
        native = segmentor(dense, 3, SMALL).eval()
        torch.manual_seed(0)
        restored = segmentor(dense, 3, SMALL.model_copy(update={"neck": "restore"})).eval()
        x = images(native)
        with torch.no_grad():
            assert torch.equal(native(x), restored(x))

    @pytest.mark.whole
    def test_exports_with_its_merges_folded(self, tmp_path):
        pytest.importorskip("onnxruntime")
        model = segmentor(vit(img_size=(24, 40), depth=3), 3, SMALL).eval()
        done = export(model, tmp_path / "model.onnx")
        assert done.apart < 1e-4
        assert any(name.endswith("delta") for name in model.state_dict())

    @pytest.mark.parametrize(
        ("wrong", "error", "told"),
        [
            (lambda: segmentor(segmentor(vit(), 3, SMALL), 3, SMALL), AdoptError, "must be a classifier"),
            (lambda: segmentor(vit(), 3, SMALL, size=(33, 48)), RecipeError, "sides must be multiples"),
            (lambda: segmentor(vit(), 3, Head(taps=(0, 1, 2))), RecipeError, "head.taps must be 4 blocks in order"),
            (lambda: segmentor(vit(), 3, Head(taps=(0, 1, 2, 2))), RecipeError, "last of them block 3"),
            (lambda: segmentor(backbone("swin"), 3, Head(taps=(0, 1, 2, 3))), RecipeError, "must be empty"),
            (lambda: segmentor(vit(merges=((1, "h"), (2, "h"))), 3, SMALL, size=(8, 48)), DataError, "halved"),
            (lambda: segmentor(stepped(Drop(kept=(0, 5)), "Drop"), 3), AdoptError, "every patch in its position"),
            (lambda: segmentor(stepped(Merge(count=2), "Merge"), 3), AdoptError, "every patch in its position"),
            (lambda: segmentor(timm_model("swin", "windows"), 3), AdoptError, "one stage or 4"),
        ],
    )
    def test_what_cannot_be_is_told(self, wrong, error, told):
        with pytest.raises(error, match=told):
            wrong()

    def test_a_plan_that_loses_places_is_refused_and_the_model_left(self):
        model = segmentor(vit(()), 3, SMALL)
        spec = describe(model)
        plan = Plan.of(spec, [BlockPlan(tokens=Drop(kept=(0, 1)))] * 4)
        with pytest.raises(AdoptError, match="every patch in its position"):
            apply(model, plan)
        assert describe(model) == spec

    def test_prefix_tokens_alone_are_no_backbone(self):
        model = vit(())
        plan = Plan.of(describe(model), [BlockPlan()] * 3 + [BlockPlan(only_prefix=True)])
        with pytest.raises(AdoptError, match="compress without only_prefix"):
            segmentor(apply(model, plan), 3, SMALL)


def stepped(step, kind) -> nn.Module:
    """A ViT with a token step in its second block and after."""
    model = vit(())
    later = [BlockPlan(tokens=step)] * 3 if kind == "Drop" else [BlockPlan(tokens=step), BlockPlan(), BlockPlan()]
    return apply(model, Plan.of(describe(model), [BlockPlan(), *later]))


class TestNeck:
    @pytest.mark.parametrize("grid", [(14, 14), (7, 5), (4, 6), (5, 3)])
    @pytest.mark.parametrize("halved", [(0, 0), (0, 1), (1, 1), (2, 1)])
    def test_a_constant_stays_one_on_every_level(self, grid, halved):
        cells = [-(-n // 2**often) for n, often in zip(grid, halved, strict=True)]
        whole = rounded(grid, 4)
        for level in range(4):
            size = (whole[0] * 4 >> level, whole[1] * 4 >> level)
            laid = lay_on(torch.full((1, 2, *cells), 3.25, dtype=torch.float64), halved, whole, size)
            assert laid.shape == (1, 2, *size)
            assert float((laid - 3.25).abs().max()) < EXACT

    @pytest.mark.parametrize(("columns", "often"), [(8, 0), (8, 1), (8, 2), (7, 1), (7, 0)])
    @pytest.mark.parametrize("level", range(4))
    def test_every_token_lies_in_the_middle_of_its_places(self, columns, often, level):
        """A map of coordinates, merged as means, still tells coordinates on every level, off the border."""
        places = torch.arange(columns, dtype=torch.float64) + 0.5
        step = 2**often
        centres = torch.stack([places[i : i + step].mean() for i in range(0, columns - columns % step, step)])
        cells = -(-columns // step)
        if len(centres) < cells:
            centres = torch.cat([centres, places[-1:] + (step - 1) / 2])
        whole = rounded((2, columns), 4)
        size = (whole[0] * 4 >> level, whole[1] * 4 >> level)
        laid = lay_on(centres.expand(1, 1, 2, -1), (0, often), whole, size)[0, 0, 0]
        wanted = (torch.arange(size[1], dtype=torch.float64) + 0.5) * whole[1] / size[1]
        inner = (wanted > step / 2) & (wanted < columns - step)
        assert inner.any()
        assert float((laid - wanted)[inner].abs().max()) < EXACT

    def test_restoring_first_is_unmerging_bilinearly(self):
        maps = torch.randn(1, 2, 2, 3, dtype=torch.float64)
        assert apart(lay_on(maps, (1, 1), (4, 6), (4, 6)), unmerge(maps, (4, 6), (1, 1))) < EXACT


def scene(seed: int, size=(48, 60)) -> tuple[np.ndarray, np.ndarray]:
    """A scene whose red says the class of each pixel: 60 times its value in the file."""
    rng = np.random.default_rng(seed)
    mask = np.zeros(size, dtype=np.uint8)
    mask[size[0] // 2 :] = 1
    row, column = rng.integers(0, size[0] - 20), rng.integers(0, size[1] - 24)
    mask[row : row + 20, column : column + 24] = 3
    mask[:4] = 2
    picture = np.stack([60 * mask, np.full(size, 90, np.uint8), np.full(size, 30, np.uint8)], -1)
    return picture, mask


def write_scenes(root: Path, counts=(("train", 8), ("test", 3)), size=(48, 60)) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / "classes.txt").write_text("\n".join(NAMES) + "\n")
    for split, count in counts:
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for index in range(count):
            picture, mask = scene(index + (100 if split == "test" else 0), size)
            Image.fromarray(picture).save(root / split / "images" / f"{index}.png")
            Image.fromarray(mask).save(root / split / "masks" / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def street(tmp_path_factory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes") / "street")


@pytest.fixture
def broken(tmp_path):
    """A copy of the street whose second training mask is replaced."""

    def make(mask: np.ndarray | None = None, mode: str = "L", **changes) -> Path:
        root = write_scenes(tmp_path / "broken", (("train", 3), ("test", 1)))
        if mask is not None:
            Image.fromarray(mask, mode if mode != "L" else None).save(root / "train" / "masks" / "1.png")
        if "classes" in changes:
            (root / "classes.txt").write_text(changes["classes"])
        return root

    return make


class TestScenes:
    def test_a_folder_and_its_tar_are_one(self, street, tmp_path):
        with tarfile.open(tmp_path / "street.tar", "w") as tar:
            tar.add(street, arcname=".")
        packed, plain = str(tmp_path / "street.tar"), str(street)
        assert scene_splits(packed) == scene_splits(plain) == ("train", "test")
        one, two = (open_scenes(source, "test", ignore=["unlabelled"]) for source in (packed, plain))
        assert one.names == two.names == ("sky", "road", "car")
        for (a, b), (c, d) in zip(one, two, strict=True):
            assert a.tobytes() == c.tobytes()
            assert b.tobytes() == d.tobytes()

    def test_ignored_classes_leave_the_count(self, street):
        scenes = open_scenes(str(street), "train", ignore=["unlabelled"])
        _, mask = scene(0)
        values = np.asarray(scenes[0][1])
        assert np.array_equal(values, np.array([0, 1, IGNORE, 2])[mask])
        pixels = scenes.checked()
        assert pixels.sum() == 8 * 44 * 60
        assert np.array_equal(open_scenes(str(street), "train").checked()[[0, 1, 3]], pixels)

    def test_an_undivided_source_is_training_alone(self, tmp_path):
        root = write_scenes(tmp_path / "flat", (("train", 2),))
        for kind in ("images", "masks"):
            (root / "train" / kind).rename(root / kind)
        assert len(open_scenes(str(root), "train")) == 2
        assert scene_splits(str(root)) == ()

    @pytest.mark.parametrize(
        ("mask", "told"),
        [
            (np.zeros((40, 60), np.uint8), r"masks/1\.png: a mask must have the size of its image, 60 x 48, but has "),
            (np.full((48, 60), 4, np.uint8), r"one of the 4 lines of classes\.txt \(0 to 3\) or 255"),
            (np.full((48, 60), IGNORE, np.uint8), "a mask must have a pixel of a class that counts"),
            (np.full((48, 60), 2, np.uint8), "all of its pixels are ignored; remove it and train/images/1.png"),
            (np.zeros((48, 60, 3), np.uint8), "one label per pixel, but its mode is RGB"),
        ],
    )  # fmt: skip
    def test_a_wrong_mask_is_told_before_anything_is_trained(self, broken, mask, told, tmp_path):
        root = broken(mask)
        with pytest.raises(DataError, match=told):
            open_scenes(str(root), "train", ignore=["unlabelled"]).checked()
        with pytest.raises(DataError, match=told):
            run_transfer(asked(str(root)), tmp_path / "out", backbone=vit())
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            (lambda root: (root / "classes.txt").unlink(), "must have a classes.txt"),
            (lambda root: (root / "classes.txt").write_text("a\na\n"), "different names"),
            (lambda root: (root / "classes.txt").write_text("a\nunlabelled\n"), "at least 2 classes must count"),
            (lambda root: (root / "train/masks/1.png").unlink(), "every image must have a mask of the same stem"),
            (lambda root: (root / "train/images/1.png").unlink(), "every mask must have a image"),
            (lambda root: (root / "train/masks/1.png").write_bytes(b"no"), "every mask must decode"),
            (lambda root: (root / "train/images/1.png").write_bytes(b"no"), "every image must decode"),
            (lambda root: (root / "train/images/1.jpg").write_bytes(b"no"), "a stem must name one file"),
            (lambda root: [path.unlink() for path in root.glob("train/masks/*")], "but there are 3 and 0"),
        ],
    )
    def test_a_wrong_source_is_told(self, broken, change, told):
        root = broken()
        change(root)
        with pytest.raises(DataError, match=told):
            open_scenes(str(root), "train", ignore=["unlabelled"]).checked()

    def test_what_is_not_there_is_told(self, street):
        for arguments, told in (
            (("nowhere",), "a source must exist"),
            ((str(street), "validation"), "must have a split 'validation'"),
            ((str(street), "train"), "a class to ignore must be in classes.txt"),
        ):
            with pytest.raises(DataError, match=told):
                open_scenes(*arguments, ignore=["void"])

    @pytest.mark.parametrize("ratio", [(1.25, 1.25), (0.4, 0.6), (1.5, 2.0)])
    def test_picture_and_mask_move_together(self, street, ratio):
        scenes = open_scenes(str(street), "train")
        input = Input(size=SIZE, mean=(0,) * 3, std=(1,) * 3, interpolation="nearest")
        loader = SceneLoader(scenes, input, SceneAugment(ratio=ratio, distort=False), **BATCHES)
        for pictures, labels in loader.epoch(0):
            assert pictures.shape == (4, 3, *SIZE)
            assert labels.shape == (4, *SIZE)
            counts = labels != IGNORE
            assert torch.equal((pictures[:, 0] * 255 / 60).round().long()[counts], labels[counts])
            assert bool((pictures[:, 1][~counts] == 0).all())
            assert bool((~counts).any()) == (ratio[1] < 1)

    def test_an_item_is_a_function_of_seed_epoch_and_number(self, street):
        scenes = open_scenes(str(street), "train")
        loader = SceneLoader(scenes, Input(size=SIZE), SceneAugment(), **BATCHES)
        first = list(loader.epoch(1))
        torch.manual_seed(9)
        again = list(loader.epoch(1, start_step=1))
        assert torch.equal(first[1][0], again[0][0])
        assert torch.equal(first[1][1], again[0][1])
        assert not torch.equal(first[0][0], next(iter(loader.epoch(2)))[0])


BATCHES = {"batch": 4, "seed": 0, "workers": 0, "rank": 0, "world": 1, "accumulate": 1, "even": False, "device": None}


class TestObjective:
    def loss(self, smoothing: float = 0.0) -> PixelObjective:
        return PixelObjective(Distill(), smoothing, None, True)

    def test_is_the_cross_entropy_over_all_pixels(self):
        logits, labels = torch.randn(4, 3, 5, 6, dtype=torch.float64), torch.randint(0, 3, (4, 5, 6))
        labels[0, :2] = IGNORE
        wanted = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum") / labels.numel()
        assert apart(self.loss().loss(logits, labels, None), wanted) < EXACT
        parts = sum(self.loss().loss(logits[i : i + 2], labels[i : i + 2], None) for i in (0, 2)) / 2
        assert apart(parts, wanted) < EXACT

    def test_a_crop_without_labels_does_no_harm(self):
        logits = torch.randn(1, 3, 4, 4, requires_grad=True)
        value = self.loss(0.1).loss(logits, torch.full((1, 4, 4), IGNORE), None)
        value.backward()
        assert value.item() == 0
        assert float(logits.grad.abs().max()) == 0

    def test_a_teacher_is_refused(self):
        with pytest.raises(RecipeError, match="a teacher is given"):
            PixelObjective(Distill(), 0.0, nn.Identity(), True)

    def test_the_rate_falls_as_a_polynomial(self):
        settings = asked("scenes").train.model_copy(update={"lr": 1.0, "min_lr": 0.0, "power": 0.5})
        assert [learning_rate(step, 100, 0, settings) for step in (0, 36, 75, 100)] == pytest.approx([1, 0.8, 0.5, 0])


class Reader(nn.Module):
    """Reads the class of each pixel off its red; takes images of any size, windows at least of `SIZE`."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.num_classes = classes
        self.anchor = nn.Parameter(torch.zeros(()))
        self.sizes: set[tuple[int, ...]] = set()

    def set_input_size(self, size: tuple[int, int]) -> None:
        pass

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        type(self).seen.add(tuple(x.shape[2:]))
        wanted = torch.arange(self.num_classes)[None, :, None, None]
        return -((x[:, :1] * 255 / 60) - wanted).square() + self.anchor

    seen: set[tuple[int, ...]] = set()  # noqa: RUF012 one for all copies, to be looked at


class TestScore:
    @pytest.mark.parametrize("mode", ["whole", "slide"])
    def test_who_reads_the_answer_is_right_everywhere(self, tmp_path, mode):
        root = write_scenes(tmp_path / "scenes", (("test", 2),), size=(32, 64))
        scenes = open_scenes(str(root), "test")
        input = Input(size=(32, 32), mean=(0,) * 3, std=(1,) * 3, interpolation="nearest")
        Reader.seen.clear()
        found, kept = score(Reader(4), scenes, input, SceneTest(mode=mode, align=32), keep=[1])
        assert (found.miou, found.accuracy, found.scenes) == (100, 100, 2)
        assert np.array_equal(kept[1].numpy(), scene(101, (32, 64))[1])
        assert Reader.seen == ({(32, 64)} if mode == "whole" else {(32, 32)})

    def test_figures_are_those_of_the_confusion(self, tmp_path):
        """Two pixels right of class 0, one of it said to be 1; class 2 nowhere; one pixel ignored."""
        root = tmp_path / "scenes"
        for kind in ("images", "masks"):
            (root / kind).mkdir(parents=True)
        (root / "classes.txt").write_text("a\nb\nc\n")
        said, truth = np.array([[0, 0], [1, 1], [1, 0]], np.uint8), np.array([[0, 0], [0, 1], [1, 255]], np.uint8)
        picture = np.stack([60 * said] * 3, -1).repeat(16, 0).repeat(16, 1)
        Image.fromarray(picture).save(root / "images" / "x.png")
        Image.fromarray(truth.repeat(16, 0).repeat(16, 1)).save(root / "masks" / "x.png")
        input = Input(size=(48, 32), mean=(0,) * 3, std=(1,) * 3)
        found, _ = score(Reader(3), open_scenes(str(root)), input, SceneTest(align=16))
        assert found.iou == pytest.approx((100 * 2 / 3, 100 * 2 / 3, None))
        assert found.recall == pytest.approx((100 * 2 / 3, 100, None))
        assert found.miou == pytest.approx(100 * 2 / 3)
        assert found.accuracy == pytest.approx(80)
        assert found.pixels == (3 * 256, 2 * 256, 0)

    def test_a_whole_scene_sets_the_model_to_its_size(self, street):
        model = segmentor(vit(), 4, SMALL).eval()
        whole, _ = score(model, open_scenes(str(street), "test"), Input.of(model), SceneTest(align=16))
        assert whole.scenes == 3
        assert describe(model).image == SIZE

    def test_what_cannot_be_measured_is_told(self, street):
        model = segmentor(vit(), 4, SMALL).eval()
        scenes = open_scenes(str(street), "test")
        with pytest.raises(DataError, match="must have the 4 classes of the model, but has 3"):
            score(model, open_scenes(str(street), "test", ignore=["car"]), Input.of(model), SceneTest())
        with pytest.raises(RecipeError, match="sides must be multiples"):
            score(model, scenes, Input.of(model), SceneTest(align=17))


def asked(source: str, **changes) -> TransferRecipe:
    known = {
        "model": {"name": "vit"},
        "data": {"train": source, "ignore": ["unlabelled"]},
        "head": {"width": 32, "channels": 64},
        "augment": {"ratio": [0.8, 1.2], "distort": False},
        "train": {"epochs": 4, "batch": 4, "lr": 2e-3, "log_every": 1},
        "test": {"align": 16, "pictures": 2},
        "measure": QUICK,
        "device": "cpu",
    }
    return TransferRecipe.model_validate(known | changes)


@pytest.fixture(scope="module")
def done(street, tmp_path_factory):
    """A finished transfer of a merged backbone."""
    return transfer(asked(str(street)), tmp_path_factory.mktemp("run") / "done", backbone=vit())


class TestRun:
    def test_learns(self, street, done, tmp_path):
        untrained = transfer(asked(str(street), train={"epochs": 0}), tmp_path / "run", backbone=vit())
        assert done.measured["miou"] > untrained.measured["miou"] + 20
        assert done.measured["miou"] > 50

    def test_the_folder_tells_all(self, done):
        names = {path.name for path in done.folder.iterdir()}
        kept = {"recipe.toml", "log.jsonl", "model.safetensors", "measured.json", "classes.json", "report.html"}
        assert names == kept | {"pictures"}
        assert [each["name"] for each in done.classes] == ["sky", "road", "car"]
        assert done.measured["macs"] == counted(done.model).macs
        assert 0 < done.measured["macs_head"] < done.measured["macs"]
        assert store.provenance(done.folder)["given"]["classes"] == ["sky", "road", "car"]
        with torch.no_grad():
            x = images(done.model)
            assert torch.equal(vitrim.load(done.folder)(x), done.model(x))

    def test_the_report_shows_every_class_and_its_pictures(self, done):
        page, text = html([done.folder]), markdown([done.folder])
        assert page.count("data:image/png;base64,") == 2
        assert "http" not in page.replace("http://www.w3.org", "")
        for name in ("sky", "road", "car", f"{done.measured['miou']:.2f} %"):
            assert name in page
            assert name in text
        assert "unlabelled" not in page.split("<details>")[0]
        assert "mean IoU" in markdown([done.folder, done.folder])

    def test_a_killed_run_ends_with_the_same_bits(self, street, done, tmp_path, monkeypatch):
        real = SceneLoader.epoch

        def stopped(self, epoch, start_step=0):
            for number, batch in enumerate(real(self, epoch, start_step)):
                if (epoch, number) == (2, 1):
                    raise KeyboardInterrupt
                yield batch

        monkeypatch.setattr(SceneLoader, "epoch", stopped)
        with pytest.raises(KeyboardInterrupt):
            transfer(asked(str(street)), tmp_path / "run", backbone=vit())
        assert list((tmp_path / "run" / "training").iterdir())
        monkeypatch.undo()
        again = transfer(asked(str(street)), tmp_path / "run", backbone=vit())
        mine, theirs = again.model.state_dict(), done.model.state_dict()
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
        assert again.measured["miou"] == done.measured["miou"]

    def test_a_finished_run_is_read(self, street, done, monkeypatch):
        monkeypatch.setattr("vitrim.run.transfer.run.fit", None)
        again = transfer(asked(str(street)), done.folder, backbone=vit())
        assert again.measured == done.measured

    def test_parts_of_a_step_are_its_whole(self, street):
        """Two accumulated parts take the step of one, though crops have unlike numbers of pixels that count."""
        found = []
        for accumulate in (1, 2):
            torch.manual_seed(0)
            model = segmentor(vit((), torch.float64), 3, SMALL.model_copy(update={"dropout": 0.0})).double()
            recipe = asked(str(street), train={"epochs": 0.5, "batch": 4, "accumulate": accumulate, "clip": None})
            scenes = open_scenes(str(street), "train", ignore=["unlabelled"])

            def loader(dataset, input, _, **rest):
                return SceneLoader(dataset, input, SceneAugment(ratio=(0.3, 2.0)), **rest)

            task = Task(loader=loader, objective=PixelObjective)
            records: list[dict] = []
            fit(model, scenes, recipe.train, input=Input.of(model), seed=0, task=task, log=records.append)
            found.append(records[-1]["loss"])
        assert found[0] == pytest.approx(found[1], rel=1e-10)

    @pytest.mark.parametrize(
        ("changes", "told"),
        [
            ({"train": {"mixup": 0.8}}, "train.mixup and train.cutmix must be 0"),
            ({"train": {"augment": {"kind": "full"}}}, "train.augment must be left out"),
            ({"head": {"kind": "fpm"}}, "head.kind"),
            ({"head": {"channels": 40}}, "multiple of 32"),
            ({"augment": {"ratio": [2.0, 0.5]}}, "ratio must rise"),
            ({"budget": "macs=0.5"}, "TransferRecipe has no field 'budget'"),
        ],
    )
    def test_a_wrong_recipe_is_told(self, changes, told):
        from vitrim.words.plain import load

        known = {"model": {"name": "vit"}, "data": {"train": "scenes"}} | changes
        with pytest.raises(RecipeError, match=told):
            load(TransferRecipe, known, RecipeError)

    @pytest.mark.parametrize("package", ["segmentation_models_pytorch", "torchmetrics"])
    def test_a_missing_package_is_told_first(self, street, tmp_path, monkeypatch, package):
        for name in [name for name in sys.modules if name.split(".")[0] == package]:
            monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(VitrimError, match=rf"{package} must be installed .* run pip install 'vitrim\[seg\]'"):
            transfer(asked(str(street)), tmp_path / "run", backbone=vit())
        assert not (tmp_path / "run").exists()

    def test_folders_of_other_runs_are_left(self, street, done, tmp_path):
        with pytest.raises(RunError, match="its recipe differs in seed"):
            transfer(asked(str(street), seed=1), done.folder, backbone=vit())
        other = tmp_path / "compressed"
        compress(vit(()), method="magnitude", budget="macs=0.8", measure=QUICK, out=other)
        with pytest.raises(RunError, match="another kind of run"):
            transfer(asked(str(street)), other, backbone=vit())

    def test_a_source_without_test_scenes_is_told(self, tmp_path):
        root = write_scenes(tmp_path / "flat", (("train", 2),))
        with pytest.raises(VitrimError, match="must have a split 'test'"):
            transfer(asked(str(root)), tmp_path / "run", backbone=vit())

    def test_classes_of_pictures_are_no_data_for_a_segmentor(self, done):
        with pytest.raises(RecipeError, match="compress its backbone and transfer that"):
            compress(str(done.folder), "digits", method="taylor")
        assert (
            compress(str(done.folder), method="magnitude", budget="macs=0.95", measure=QUICK).measured["top1"] is None
        )


class TestCommands:
    @pytest.fixture
    def call(self, monkeypatch, capsys):
        def run(*arguments) -> tuple[int, str, str]:
            monkeypatch.setattr(sys, "argv", ["vitrim", *map(str, arguments)])
            with pytest.raises(SystemExit) as caught:
                cli.main()
            return caught.value.code or 0, *capsys.readouterr()

        return run

    def test_transfer_run_and_evaluate(self, street, call, tmp_path):
        stored = vitrim.save(vit(), tmp_path / "backbone.safetensors")
        quick = [
            "--set", "measure.latency=false", "--set", "head.width=32", "--set", "head.channels=64",
            "--set", "train.batch=8", "--set", "device=cpu", "--set", "test.align=16",
        ]  # fmt: skip
        code, out, error = call(
            "transfer", "seg", "--backbone", stored, "--data", street, "--head", "fpn", "--out", tmp_path / "run",
            "--ignore", "unlabelled", "--size", "32x32", "--epochs", "1", *quick,
        )  # fmt: skip
        assert code == 0, error
        assert "mean intersection over union" in out
        measured = json.loads((tmp_path / "run" / "measured.json").read_text())
        assert measured["image"] == "32 x 32"
        assert call("run", tmp_path / "run" / "recipe.toml")[0] == 0
        code, out, error = call("evaluate", tmp_path / "run" / "model.safetensors", "--data", street)
        assert code == 0, error
        assert f"{measured['miou']:.2f} %" in out
        code, out, error = call("report", tmp_path / "run")
        assert "Every class" in out

    def test_eight_bits_are_measured_on_scenes(self, street, done, call, tmp_path):
        code, out, error = call(
            "export", done.folder / "model.safetensors", "--out", tmp_path / "m.onnx", "--int8", "--data", street,
            "--test", street, "--set", "data.calibration=6",
        )  # fmt: skip
        assert code == 0, error
        scenes = open_scenes(str(street), "test", ignore=["unlabelled"])
        windows = SceneTest(mode="slide")
        known, _ = score(done.model, scenes, Input.of(done.model), windows)
        before, after = (float(part.split()[0]) for part in out.split("mean IoU")[1].split("%")[:2])
        assert before == pytest.approx(known.miou, abs=0.006)
        assert known.miou - 20 < after < 100
        assert "calibrated on 6 images" in " ".join(error.split())

        _, run = onnx_session(tmp_path / "m.onnx")
        quantized = nn.Module()
        quantized.forward, quantized.num_classes = run, 3
        assert after == pytest.approx(score(quantized, scenes, Input.of(done.model), windows)[0].miou, abs=0.006)

    def test_a_wrong_request_is_one_sentence(self, street, call, tmp_path):
        given = ["--backbone", "test_vit", "--random-weights", "--data", street, "--out", tmp_path / "run"]
        for more, told in (
            (("--size", "32"), "data.size"),
            (("--head", "unet"), "head.kind"),
            (("--ignore", "void"), "'void' is not"),
        ):
            code, out, error = call("transfer", "seg", *given, *more)
            assert (code, out) == (2, "")
            assert told in error.splitlines()[-1]
            assert not (tmp_path / "run").exists()


def test_recipes_of_ade20k_are_strict_and_as_specified():
    from vitrim.words.plain import read_toml

    paths = sorted((Path(vitrim.__file__).parent / "recipes").glob("*ade20k*.toml"))
    assert paths
    for path in paths:
        text = path.read_text()
        assert "not yet measured" in text
        recipe = TransferRecipe.model_validate(read_toml(path))
        assert recipe.data.size == (512, 512)
        assert (recipe.head.kind, recipe.head.width, recipe.head.channels, recipe.head.dropout) == (
            "fpn",
            256,
            128,
            0.1,
        )
        assert (recipe.train.lr, recipe.train.weight_decay, recipe.train.min_lr) == (2e-4, 1e-4, 1e-6)
        assert (recipe.train.schedule, recipe.train.power) == ("poly", 0.9)
        # 40,000 steps of batch 32 over the 20,210 training scenes.
        assert round(recipe.train.epochs * (20210 // recipe.train.batch)) in (40000, 80000)
        assert recipe.train.epochs * (20210 // recipe.train.batch) * recipe.train.batch == pytest.approx(
            1.28e6, rel=1e-3
        )
        assert recipe.augment == SceneAugment(ratio=(0.5, 2.0), hflip=0.5, distort=True)
        assert (recipe.test.mode, recipe.test.align) == ("whole", 32)
        assert isinstance(recipe.model, ModelRecipe)


def test_colours_differ_and_pictures_are_small():
    assert len(set(colours(150))) == 150
    picture = Image.new("RGB", (800, 400))
    labels = np.zeros((400, 800), np.uint8)
    labels[:, 400:] = IGNORE
    sheet = side_by_side(picture, labels, labels, ["#ff0000"])
    assert sheet.size == (3 * 360 + 12, 180)
    assert sheet.getpixel((370, 90)) == (255, 0, 0)
    assert sheet.getpixel((720, 90)) == (0, 0, 0)
