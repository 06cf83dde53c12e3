"""Cost is counted, and time is measured side by side, leaving models and process as they were."""

import pytest
import torch
from torch import nn

from vitrim.errors import AdoptError, RecipeError
from vitrim.measure import Cost, Latency, cost, counted, latency
from vitrim.plain import dump, load
from vitrim.spec import Attention, Block, Form, Host, Norm, Spec, Stage

IMAGE = (3, 8, 8)


class Toy(nn.Module):
    """A network whose time grows with `depth`."""

    def __init__(self, depth: int = 1, width: int = 192) -> None:
        super().__init__()
        inner = [nn.Sequential(nn.Linear(width, width), nn.Dropout(0.5)) for _ in range(depth)]
        self.layers = nn.Sequential(nn.Flatten(), *inner)
        self.seen: list[tuple[bool, bool, int, torch.dtype]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append((self.training, torch.is_inference_mode_enabled(), torch.get_num_threads(), x.dtype))
        return self.layers(x)


class Odd(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def quick(model: nn.Module, reference: nn.Module | None = None, **settings) -> Latency:
    return latency(model, reference, **{"image": IMAGE, "batch": 4, "seconds": 0.05, **settings})


def test_a_model_takes_as_long_as_itself():
    model = Toy(4)
    told = quick(model, model, seconds=0.3)
    assert 0.5 < told.ratio < 2
    assert told.ratio_low <= told.ratio <= told.ratio_high


def test_a_bigger_model_takes_longer():
    told = quick(Toy(40), Toy(1), seconds=0.3)
    assert told.ratio > 1
    assert told.seconds > told.reference_seconds


def test_times_and_origin_are_complete():
    told = quick(Toy(), Toy())
    assert 0 < told.seconds_low <= told.seconds <= told.seconds_high
    assert told.images_per_second == pytest.approx(4 / told.seconds)
    assert told.peak_bytes is None
    assert told.runs >= 6
    assert told.runs % 2 == 0
    assert (told.batch, told.image, told.dtype) == (4, IMAGE, "float32")
    assert told.threads == torch.get_num_threads()
    assert told.device.startswith("cpu")
    assert told.torch == torch.__version__
    assert told.timm
    assert load(Latency, dump(told)) == told


def test_without_a_reference_there_is_no_ratio():
    told = quick(Toy())
    assert (told.ratio, told.ratio_low, told.ratio_high, told.reference_seconds) == (None,) * 4


def test_mode_threads_and_type_are_given_back():
    model, before = Toy(2), torch.get_num_threads()
    model.train()
    model.layers[1].eval()
    told = quick(model, threads=before + 1)
    assert told.threads == before + 1
    assert set(model.seen) == {(False, True, before + 1, torch.float32)}
    assert torch.get_num_threads() == before
    assert model.training
    assert model.layers[2].training
    assert not model.layers[1].training


def test_another_type_runs_on_a_copy():
    model = Toy()
    told = quick(model, dtype=torch.float64)
    assert told.dtype == "float64"
    assert model.seen == []
    assert next(model.parameters()).dtype == torch.float32


def test_a_failing_model_is_given_back_too():
    model, before = Toy(), torch.get_num_threads()
    with pytest.raises(RuntimeError):
        quick(model, image=(3, 9, 9), threads=before + 1)
    assert model.training
    assert torch.get_num_threads() == before


def test_models_take_turns():
    calls: list[str] = []

    def named(name: str) -> nn.Module:
        model = Toy()
        model.register_forward_hook(lambda *_: calls.append(name))
        return model

    told = quick(named("a"), named("b"), runs=2, seconds=1e-9, warmup=1)
    turns = "".join(calls)[2 :: told.repeats] if told.repeats > 1 else "".join(calls)[2:]
    assert turns == "abba"


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"batch": 0}, "batch must be a whole number of at least 1, but got 0"),
        ({"batch": 1.5}, "batch must be a whole number"),
        ({"runs": 1}, "runs must be"),
        ({"warmup": 0}, "warmup must be"),
        ({"threads": 0}, "threads must be"),
        ({"seconds": 0}, "seconds must be above 0"),
        ({"seconds": float("nan")}, "seconds must be above 0"),
        ({"image": (3, 8)}, "image must be"),
        ({"image": (3, 8, 0)}, "image must be"),
        ({"image": None}, "pass image="),
    ],
)
def test_wrong_settings_are_refused(settings: dict, text: str):
    model = Toy()
    with pytest.raises(RecipeError, match=text):
        quick(model, **settings)
    assert model.training
    assert model.seen == []


def test_pytorch_counts_products():
    model = Toy(3)
    assert counted(model, IMAGE) == Cost(3 * 192 * 192, 3 * (192 * 192 + 192))
    assert model.training


def test_attention_is_counted():
    class Attend(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x)

    assert counted(Attend(), (2, 5, 8)) == Cost(2 * 2 * 5 * 5 * 8, 0)


def test_half_a_product_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("vitrim.measure.count.FlopCounterMode.get_total_flops", lambda self: 7)
    with pytest.raises(AdoptError, match="counted 7"):
        counted(Odd(), IMAGE)


def test_a_spec_is_priced_as_it_stands():
    norm = Norm(name="LayerNorm", eps=1e-6)
    form = Form(
        norm=norm, qkv_bias=True, out_bias=True, mlp="plain", activation="GELU", hidden_bias=True, mlp_out_bias=True
    )
    block = Block(mixer=Attention(qk=(4, 4), v=(4, 4), scale=0.5), hidden=16)
    stage = Stage(width=8, grid=(2, 2), prefix=1, form=form, blocks=(block,))
    host = Host(name="toy", arguments={}, macs=10, params=7)
    spec = Spec(family="vit", host=host, image=(4, 4), classes=2, stages=(stage,))
    macs = 10 + (5 * 8 * 3 * 8 + 5 * 5 * 8 * 2 + 5 * 8 * 8) + 2 * 5 * 8 * 16
    params = 7 + (8 * 24 + 24 + 8 * 8 + 8 + 16) + (8 * 16 + 16 + 16 * 8 + 8 + 16)
    assert cost(spec) == Cost(macs, params)
