"""Settings that fit the machine: what ``auto`` becomes, and that speed and memory change no result."""

import os
import types

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from vitrim import adopt
from vitrim.cut.observe import listening
from vitrim.data import Augment, Images, Input, eval_loader, inputs, train_loader
from vitrim.deploy import bench as benching
from vitrim.measure import clock, latency
from vitrim.measure.turns import place_of
from vitrim.methods.vit_slim import gate_model
from vitrim.nn.device import free_bytes, why_not_type
from vitrim.nn.feed import summing
from vitrim.run.machine import device_of, on_machine
from vitrim.run.recipe import Recipe, write_recipe
from vitrim.train import Train, evaluate, fit
from vitrim.train.machine import settled, tf32_allowed
from vitrim.words.errors import RecipeError, RunError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
INPUT = Input(size=(8, 8), crop_pct=1.0)
PLAIN = Train(epochs=1, batch=8, lr=1e-3, augment=Augment(kind="none"))


def images(count=24, fixed=False):
    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), np.uint8)
    return Images(lambda i: Image.fromarray(pixels[i]), np.arange(count) % 3, classes=3, source="noise", fixed=fixed)


def vit(**given):
    torch.manual_seed(0)
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    return timm.create_model("vit_tiny_patch16_224", **(sizes | {"proj_drop_rate": 0.1} | given))


def trained(model=None, task=None, **changes):
    model = vit() if model is None else model
    fit(model, images(), PLAIN.model_copy(update=changes), input=INPUT, seed=0)
    return model


def equal(one, two):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


@pytest.fixture
def has_bf16(monkeypatch, request):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: request.param)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "an old card")


class TestAuto:
    def test_on_a_cpu(self):
        found = settled(Train(), CPU)
        assert (found.precision, found.workers, found.channels_last) == ("fp32", 0, False)

    @pytest.mark.parametrize("has", [True, False])
    def test_minutes_on_a_cpu_that_multiplies_bf16(self, has, monkeypatch):
        told = {"amx_tile": has, "amx_bf16": has}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: told, raising=False)
        assert settled(Train(minutes=4), CPU).precision == ("bf16" if has else "fp32")
        assert settled(Train(), CPU).precision == "fp32"
        assert settled(Train(minutes=4, precision="fp32"), CPU).precision == "fp32"

    @pytest.mark.parametrize(("has_bf16", "wanted"), [(True, "bf16"), (False, "fp32")], indirect=["has_bf16"])
    def test_on_a_card(self, has_bf16, wanted, monkeypatch):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
        found = settled(Train(), CUDA)
        assert (found.precision, found.workers, found.channels_last) == (wanted, 7, True)

    @pytest.mark.parametrize("has_bf16", [False], indirect=True)
    def test_a_precision_that_the_card_lacks(self, has_bf16, monkeypatch):
        with pytest.raises(
            RecipeError, match=r"must be one that the device has, but an old card has no bf16; use fp32"
        ):
            settled(Train(precision="bf16"), CUDA)
        assert settled(Train(precision="fp16"), CUDA).precision == "fp16"
        for module, call in (
            (clock, lambda: latency(vit(), dtype=torch.bfloat16, device="cuda")),
            (benching, lambda: benching.bench({"x": adopt(vit())}, dtype=torch.bfloat16, device="cuda")),
        ):
            monkeypatch.setattr(module, "place_of", torch.device)
            with pytest.raises(RecipeError, match="dtype must be one that the device has, but an old card has no bf16"):
                call()

    @pytest.mark.parametrize(
        ("cores", "processes", "start", "wanted"),
        [(1, 1, "fork", 0), (8, 1, "fork", 7), (64, 1, "fork", 16), (64, 8, "fork", 7), (4, 8, "fork", 0),
         (8, 1, "spawn", 0)],
    )  # fmt: skip
    def test_workers(self, cores, processes, start, wanted, monkeypatch):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
        monkeypatch.setattr(inputs.multiprocessing, "get_start_method", lambda allow_none: start)
        assert inputs.workers_for(CUDA) == wanted

    def test_a_run_goes_on_with_what_it_began_with(self, tmp_path):
        asked = Recipe(model={"name": "x"}, method={"name": "vit_slim"}, budget="macs=0.5").resolved()
        began = on_machine(asked)
        assert began.method["train"]["precision"] == began.train.precision == "fp32"
        other = began.model_copy(update={"train": began.train.model_copy(update={"precision": "bf16", "workers": 3})})
        other.method["train"]["workers"] = 5
        write_recipe(tmp_path / "recipe.toml", other)
        found = on_machine(asked, tmp_path)
        assert (found.train.precision, found.train.workers, found.method["train"]["workers"]) == ("bf16", 3, 5)


class TestSameResult:
    """What saves time or memory gives the same weights."""

    def test_checkpointing(self):
        assert equal(trained(), trained(checkpointing=True))

    def test_checkpointing_of_gated_weights(self):
        """Gates are multiplied into the weights for one forward pass, and are gone when it is repeated."""
        models = [
            trained(gate_model(adopt(vit().eval()), attention=True, mlp=True), checkpointing=on) for on in (False, True)
        ]
        assert equal(*models)
        assert not torch.equal(next(iter(models[0].gates.values())), torch.ones(()))

    def test_checkpointing_computes_again(self):
        calls = []
        model = vit()
        model.blocks[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        trained(model)
        once = len(calls)
        trained(model, checkpointing=True)
        assert len(calls) - once == once + 3  # once more for each step

    def test_checkpointing_where_hooks_come_and_go(self):
        class Masked(nn.Module):
            def __init__(self):
                super().__init__()
                self.model = adopt(vit(proj_drop_rate=0.0).eval())

            def forward(self, x):
                with listening(self.model, {"stages.0.blocks.1.hidden": lambda activation: None}):
                    return self.model(x)

        with pytest.raises(RecipeError, match="checkpointing must be off where blocks are changed during a step"):
            trained(Masked(), checkpointing=True)

    def test_a_model_without_blocks(self):
        with pytest.raises(RecipeError, match="checkpointing must have blocks"):
            trained(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), checkpointing=True)

    def test_channels_last(self):
        plain, last = trained(), trained(channels_last=True)
        assert last.patch_embed.proj.weight.is_contiguous()
        for a, b in zip(plain.parameters(), last.parameters(), strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)

    def test_compiled(self, monkeypatch):
        asked = []
        real = torch.compile

        def traced(model, **options):
            asked.append(options)
            return real(model, backend="eager", **options)

        monkeypatch.setattr(torch, "compile", traced)
        plain, quick = trained(vit(proj_drop_rate=0.0)), trained(vit(proj_drop_rate=0.0), compile=True)
        assert asked == [{"dynamic": False}]
        for a, b in zip(plain.parameters(), quick.parameters(), strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)

    def test_no_compiler(self, monkeypatch):
        def broken(*_):
            raise RuntimeError("no working C++ compiler")

        real = torch.compile
        monkeypatch.setattr(torch, "compile", lambda model, **options: real(model, backend=broken, **options))
        with pytest.raises(
            RunError, match=r"train.compile must be able to compile .* no working C\+\+ compiler.*; leave it"
        ):
            trained(compile=True)

    def test_tf32_is_restored(self):
        before = torch.get_float32_matmul_precision()
        with tf32_allowed(CUDA, True):
            assert torch.get_float32_matmul_precision() == "high"
        assert torch.get_float32_matmul_precision() == before
        for device, allowed in ((CPU, True), (CUDA, False)):
            with tf32_allowed(device, allowed):
                assert torch.get_float32_matmul_precision() == before

    def test_evaluation_in_bf16(self):
        model, kinds = vit().eval(), []
        model.head.register_forward_hook(lambda _m, _i, out: kinds.append(out.dtype))
        found = evaluate(model, eval_loader(images(), INPUT, batch=8), precision="bf16")
        assert kinds == [torch.bfloat16] * 3
        assert found.loss == pytest.approx(evaluate(model, eval_loader(images(), INPUT)).loss, rel=0.02)


class TestMemory:
    @pytest.mark.parametrize("table", ["train", "method.train"])
    def test_a_batch_that_does_not_fit(self, table):
        model = vit()
        before = model.patch_embed.forward

        def full(x):
            if model.training:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 TiB")
            return before(x)

        model.patch_embed.forward = full
        stage = "train" if table == "train" else "search"
        said = (
            rf"{table}.batch must fit into the memory of the cpu, but 4 images at a time do not; raise {table}.accumul"
        )
        with pytest.raises(RunError, match=said):
            fit(model, images(), PLAIN.model_copy(update={"accumulate": 2}), input=INPUT, seed=0, stage=stage)

    def test_a_batch_of_an_evaluation(self):
        model = vit().eval()

        def full(x):
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried")

        model.forward = full
        with pytest.raises(RunError, match="a batch must fit into the memory of the cpu, but 8 images"):
            evaluate(model, eval_loader(images(), INPUT, batch=8))
        model.forward = lambda x: x.nonsense
        with pytest.raises(AttributeError):
            evaluate(model, eval_loader(images(), INPUT, batch=8))

    def test_other_errors_stay(self):
        model = vit().eval()

        def wrong(x):
            raise RuntimeError("shapes do not fit")

        model.forward = wrong
        with pytest.raises(RuntimeError, match="shapes do not fit"):
            evaluate(model, eval_loader(images(), INPUT, batch=8))

    def test_free_memory_of_a_container(self, tmp_path, monkeypatch):
        paths = tmp_path / "max", tmp_path / "current"
        for path, value in zip(paths, (4000, 1000), strict=True):
            path.write_text(f"{value}\n")
        monkeypatch.setattr("vitrim.nn.device._LIMITS", paths)
        assert free_bytes(CPU) == 3000
        paths[0].write_text("max\n")
        assert free_bytes(CPU) > 2**20


class Floats(torch.utils.data.Dataset):
    """Pictures that are tensors of the model's size already."""

    def __init__(self, dtype):
        self.x = torch.rand(16, 3, 8, 8).to(dtype)

    def __len__(self):
        return 16

    def __getitem__(self, index):
        return self.x[index], 0


class TestCache:
    @pytest.mark.parametrize(("dataset", "size"), [(images(16), 192), (Floats(torch.float32), 768)])
    def test_it_counts_bytes_of_the_type_that_pictures_have(self, dataset, size, monkeypatch):
        for free, kept in ((16 * size, True), (16 * size - 1, False)):
            monkeypatch.setattr("vitrim.data.loader.free_bytes", lambda _, free=free: free)
            monkeypatch.setattr("vitrim.data.loader.CACHE", 1.0)
            loader = train_loader(dataset, INPUT, Augment(kind="none"), batch=8, seed=0)
            list(loader.epoch(0))
            assert (loader._cache is not None) == kept

    @pytest.mark.parametrize(("share", "kept"), [(0.0, False), (0.5, True)])
    def test_the_share_is_the_datasets(self, share, kept):
        loader = train_loader(images().cached(share), INPUT, Augment(kind="none"), batch=8, seed=0)
        list(loader.epoch(0))
        assert (loader._cache is not None) == kept

    def test_never_where_a_later_picture_changes(self):
        """The first pictures are still; a later one counts its calls."""
        pixels, calls = np.zeros((24, 8, 8, 3), np.uint8), []

        def read(i):
            if i == 23:
                calls.append(1)
            return Image.fromarray(pixels[i] + np.uint8(len(calls) if i == 23 else 0))

        dataset = Images(read, np.zeros(24, dtype=int), classes=3)
        loader = train_loader(dataset, INPUT, Augment(kind="none"), batch=8, seed=0)
        list(loader.epoch(0))
        assert loader._cache is None

    def test_workers_live_on(self):
        dataset = images().cached(0)
        loader = train_loader(dataset, INPUT, Augment(kind="none"), batch=8, seed=0, workers=1)
        seen = []
        for epoch in range(2):
            next(iter(loader.epoch(epoch)))  # the rest of the epoch is left, as by a run that stops
            seen.append([worker.pid for worker in loader._reader[1]._iterator._workers])
        assert seen[0] == seen[1]
        alone = train_loader(dataset, INPUT, Augment(kind="none"), batch=8, seed=0)
        for (x, y), (a, b) in zip(loader.epoch(3), alone.epoch(3), strict=True):
            assert torch.equal(x, a)
            assert torch.equal(y, b)


def test_the_check_of_a_step_waits_for_the_step_before(monkeypatch):
    """On CUDA, loss and gradient norm are sent to the host, and looked at after the next step was sent off."""
    from vitrim.train import loop as module

    order = []

    class Event:
        def __init__(self):
            self.number = len(order)

        def record(self):
            order.append(("sent", self.number))

        def synchronize(self):
            order.append(("waited", self.number))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    fake = types.SimpleNamespace(device=CUDA, pending=None, scaler=torch.amp.GradScaler("cpu", enabled=False))
    for name in ("_guard", "_check_pending"):
        setattr(fake, name, types.MethodType(getattr(module.Loop, name), fake))
    for step in range(3):
        fake._guard(torch.tensor(1.0, dtype=torch.float64), torch.tensor(1.0), step)
    assert order == [("sent", 0), ("waited", 0), ("sent", 2), ("waited", 2), ("sent", 4)]


def test_a_card_without_kernels_is_refused_before_anything_is_read(monkeypatch):
    """Such a card gives tensors, and fails at the first sum."""

    def no_kernel(*_, **__):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    for ask in (device_of, place_of):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "zeros", no_kernel)
            with pytest.raises(
                RecipeError, match="must be one of this machine's, but got 'cpu': CUDA error: no kernel"
            ):
                ask("cpu")


def test_apples_gpus_sum_in_the_longest_type_that_they_have():
    assert summing(torch.device("mps")) is torch.float32
    assert summing(CPU) is summing(CUDA) is torch.float64
    assert why_not_type(torch.float64, torch.device("mps")) == "mps has no float64"
    assert why_not_type(torch.float64, CPU) is None
