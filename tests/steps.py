"""Steps of training that two processes take as one does, in float64; `tests/test_ranks.py` launches them."""

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from vitrim import methods
from vitrim.data import Augment, Images, Input
from vitrim.families import adopt, describe
from vitrim.methods import vit_slim
from vitrim.methods.cait.masks import Channels, free_axes
from vitrim.methods.spvit.search import SinglePath, layout
from vitrim.train import Train, fit, ranks
from vitrim.words.budget import Budget

COUNT = 24
SETTINGS = {
    "plain": Train(epochs=0.5, batch=12, clip=None, augment=Augment(hflip=0.5)),
    "mixed": Train(epochs=0.5, batch=12, accumulate=2, clip=0.5, mixup=0.8, cutmix=1.0, augment=Augment()),
    # The weights of a penalty are what they say, however many processes there are.
    "vit_slim": Train(epochs=0.5, batch=12, clip=None, augment=Augment()),
    # Scores are squares of gradients: of the mean over processes, not the mean of squares.
    "cait": Train(epochs=0.5, batch=12, accumulate=2, clip=None, augment=Augment()),
}
DRAWS = Train(epochs=1, batch=12, clip=None, augment=Augment())
"""For SPViT, whose processes draw gates of their own, so that two take no step of one."""


class Masked(nn.Module):
    """A small ViT with a mask over its channels before the head: what a search trains."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = timm.create_model(
            "vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=3
        )
        self.mask = nn.Parameter(torch.linspace(-1, 1, 16))

    def forward(self, x):
        return self.model.forward_head(self.model.forward_features(x) * self.mask)


def penalty(model):
    return 0.01 * model.mask.abs().sum()


def groups(model):
    return [{"params": [model.mask], "lr": 1e-2}]


def gated():
    """The same ViT with the gates of ViT-Slim, of channels, neurons and tokens."""
    return vit_slim.gate_model(adopt(Masked().model), tokens=True)


class Remembering(SinglePath):
    """SPViT's search model, which remembers what was drawn."""

    def _draw(self):
        self.last = super()._draw()
        return self.last


def single():
    """The same ViT with every choice of SPViT; its penalty stands for half the cost."""
    model = adopt(Masked().model)
    spec = describe(model)
    method, how = methods.get("spvit"), layout(spec)
    return Remembering(model, how).double(), {"penalty": method.penalty(spec, how, Budget.parse("macs=0.5"))}


def task_of(name):
    """A model in float64, and what `fit` is given with it."""
    if name == "spvit":
        return single()
    if name == "cait":
        model = adopt(Masked().model)
        return Channels(model.double(), free_axes(model, attention=True, mlp=True)), {}
    if name != "vit_slim":
        return Masked().double(), {"penalty": penalty, "groups": groups}
    method = methods.get("vit_slim", {"token_l1": 1e-2, "gate_lr": 1e-2})
    return gated().double(), {"penalty": vit_slim.l1_penalty(1e-2, 1e-3, 1e-2), "groups": method._groups}


def images():
    pixels = np.random.default_rng(0).integers(0, 256, (COUNT, 8, 8, 3), np.uint8)
    return Images(lambda i: Image.fromarray(pixels[i]), np.arange(COUNT) % 3, classes=3, source="noise")


def step(name):
    """Take one step; return gradients, weights after it, and the reported loss."""
    found = {}

    def keep(model, number):
        found.update({f"grad.{name}": p.grad.clone() for name, p in model.named_parameters()})
        if isinstance(model, Channels):
            model.learn()
            found.update({f"mask.{name}": b.clone() for name, b in model.named_buffers() if name.startswith("seen")})

    model, given = task_of(name)
    given |= {"input": Input(size=(8, 8), crop_pct=1.0), "seed": 0}
    done = fit(model, images(), SETTINGS.get(name, DRAWS), after_step=keep, **given)
    found |= {f"weight.{name}": p.detach().clone() for name, p in model.named_parameters()}
    if name == "spvit":
        found |= {f"drawn.{name}": value.detach().clone() for name, value in model.last.items()}
    for name in ("loss", "task", "penalty"):
        found[name] = torch.tensor(done.history[-1][name], dtype=torch.float64)
    return found


def take(folder):
    """Take every step, on each process."""
    for name in (*SETTINGS, "spvit"):
        save_file(step(name), folder / f"step-{name}-{ranks.number()}.safetensors")


def check_step(folder, name, alone):
    """Check the step of two processes against that of one."""
    first, second = (load_file(folder / f"step-{name}-{rank}.safetensors") for rank in range(2))
    masks = [
        value for key, value in alone.items() if key.startswith(("grad.mask", "grad.gates", "grad.tokens", "mask."))
    ]
    assert len(masks) == (3 if name in ("vit_slim", "cait") else 1)
    assert all(value.abs().min() > 0 for value in masks)
    for key, value in alone.items():
        assert torch.equal(first[key], second[key]), key
        # A weight is a gradient divided by its own size: its rounding errors are larger.
        tolerance = 1e-7 if key.startswith("weight.") else 1e-12
        assert torch.allclose(value, first[key], rtol=0, atol=tolerance), key


def check_draws(folder):
    """Check that each process draws gates of its own, and that they take one step."""
    first, second = (load_file(folder / f"step-spvit-{rank}.safetensors") for rank in range(2))
    drawn = [key for key in first if key.startswith("drawn.")]
    assert any(not torch.equal(first[key], second[key]) for key in drawn)
    for key, value in first.items():
        assert value.isfinite().all()
        if key not in drawn and "running" not in key:
            assert torch.equal(value, second[key]), key
