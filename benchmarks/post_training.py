"""post_training on a real ImageNet ViT-Ti, without labels and without training, next to what else needs neither.

    python benchmarks/post_training.py WEIGHTS TRAIN TEST --out FOLDER [--tasks joint:0:0.5 merging:0:0.5 ...]
    python benchmarks/post_training.py WEIGHTS TRAIN TEST --out FOLDER --latency   # on a quiet machine
    python benchmarks/post_training.py WEIGHTS TRAIN TEST --out FOLDER --table

WEIGHTS is a ViT-Ti/16 224 state dict (AugReg; input scaled to mean 0.5, std 0.5), TRAIN and TEST are tars or folders of
ImageNet images in wnid folders. A task is KIND:DRAW:SHARE; DRAW decides which 256 of the TRAIN images make the
statistics and which other 80 judge single cuts. Nothing is chosen on TEST. Kinds:

- ``joint``: patches merged and layers narrowed; ``widths``: layers narrowed alone, every patch in every block;
  ``widths_400``: the same with 400 images for the compensation, ``widths_prefix``: with the exact last block.
- ``tabled``: as joint, with the table of draw 0: another draw of the images for the compensation alone.
- ``merging``: the best measured schedule of merging and the exact last block, no widths; ``constant``: as many patches
  in every block but the last, and the exact last block.
- ``grid``: neighbours merged on the grid and layers narrowed (a table of its own).
- ``taylor``, ``magnitude``, ``mdc``: channels chosen by these methods; with ``_ridge`` behind: then compensated.
- ``torch_pruning``: Torch-Pruning 1.6, grouped Taylor importance with labels drawn from the model, heads' channels and
  neurons (``pip install torch-pruning==1.6.1``; never needed by vitrim).
- ``distil4``: the joint model after four minutes of label-free distillation on TRAIN.

Appends a line a task to ``benchmarks/post_training.jsonl``; tasks that are there are skipped. Differences to the dense
model are paired, on the same images, with their standard error. ``--latency`` times every model that lies in the folder
in turns with the dense one, one thread, batch 8, into ``post_training_latency.jsonl``; ``--table`` prints both as
Markdown.
"""

import argparse
import datetime
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from vitrim import measure, methods
from vitrim.cut.compensate import compensated, importances, recovered
from vitrim.cut.surgery import apply
from vitrim.data import Images, Input, eval_loader, open_source
from vitrim.deploy import store
from vitrim.deploy.parent import open_parent
from vitrim.families import describe
from vitrim.methods import Data
from vitrim.methods.post_training.budgets import read_off
from vitrim.methods.post_training.calibration import Calibration, read_calibration, write_calibration
from vitrim.methods.post_training.options import Kinds
from vitrim.methods.post_training.schedule import Kind, merging
from vitrim.methods.post_training.sensitivity import calibrate, logits_of
from vitrim.train import DISTILLED, Train, fit
from vitrim.words.budget import Budget
from vitrim.words.costs import cost_of
from vitrim.words.plan import Plan

RESULTS = Path(__file__).parent / "post_training.jsonl"
TIMES = Path(__file__).parent / "post_training_latency.jsonl"
BATCH = 32


@dataclass(frozen=True, eq=False)
class Bench:
    """What all tasks share."""

    weights: str
    model: nn.Module
    input: Input
    train: Images
    images: Tensor
    test: Tensor
    labels: Tensor
    dense: Tensor
    out: Path


def opened(weights: str, train: str, test: str, out: Path) -> Bench:
    """Read everything once; 1,000 and 500 images take 0.9 GB."""
    out.mkdir(parents=True, exist_ok=True)
    model = open_parent("vit_tiny_patch16_224", weights=weights)
    input_ = Input.of(model, mean=(0.5,) * 3, std=(0.5,) * 3)
    source = open_source(train, None, classes=1000)
    pictures = torch.cat([x for x, _ in eval_loader(source, input_)])
    pairs = list(eval_loader(open_source(test, None, classes=1000), input_))
    seen, labels = torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])
    return Bench(weights, model, input_, source, pictures, seen, labels, logits_of(model, seen.split(BATCH)), out)


def drawn(bench: Bench, draw: int, count: int = 256) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """`count` images for statistics and 80 others, and the numbers of the first."""
    order = torch.randperm(len(bench.images), generator=torch.Generator().manual_seed(draw))
    first, second = torch.cat([order[:256], order[336:]])[:count], order[256:336]
    return list(bench.images[first].split(BATCH)), list(bench.images[second].split(40)), first.tolist()


def calibration(bench: Bench, draw: int, merge: Kind = "bipartite") -> Calibration:
    """The table of a draw, made once."""
    path = bench.out / f"calibration-{draw}{'-grid' * (merge == 'grid')}.safetensors"
    if not path.is_file():
        images, probe, _ = drawn(bench, draw)
        exact = merge == "bipartite"
        made = calibrate(bench.model, images, probe, bench.input, seed=draw, strength=1e-2, merge=merge, exact=exact)
        write_calibration(path, made)
    return read_calibration(path)


def joint(
    bench: Bench,
    draw: int,
    share: float,
    *,
    merge: Kind = "bipartite",
    table: int | None = None,
    exact: bool | None = None,
    count: int = 256,
) -> nn.Module:
    """The method, or its widths alone."""
    images, _, _ = drawn(bench, draw, count)
    known = calibration(bench, draw if table is None else table, "grid" if merge == "grid" else "bipartite")
    exact = merge == "bipartite" if exact is None else exact
    chosen = read_off(known, Budget(macs=share), merge=merge != "none", exact=exact)
    steps = merging(describe(bench.model), chosen.merges, chosen.exact)
    base = apply(bench.model, steps) if steps != Plan.keep(describe(bench.model)) else bench.model
    worth = importances(base, images, seed=draw)
    alpha = 0.0 if any(chosen.merges) else 0.3
    plan, grafts = compensated(base, chosen.choices, images, worth, alpha=alpha)
    return apply(base, plan, grafts=grafts)


def merged(bench: Bench, draw: int, share: float) -> nn.Module:
    """Merging alone, with the same search over schedules."""
    chosen = read_off(
        calibration(bench, draw),
        Budget(macs=share),
        merge=True,
        exact=True,
        kinds=Kinds(operators=(), heads=False, widths=False, depth=False),
    )
    return apply(bench.model, merging(describe(bench.model), chosen.merges, chosen.exact))


def constant(bench: Bench, draw: int, share: float) -> nn.Module:
    """As many patches in every block but the last."""
    spec = describe(bench.model)
    for count in range(1, 60):
        left, counts = spec.stages[0].patches, []
        for _ in range(len(spec.blocks()) - 1):
            counts.append(min(count, left // 2))
            left -= counts[-1]
        steps = merging(spec, (*counts, 0), True)
        if cost_of(steps.child(spec)).macs <= share * cost_of(spec).macs:
            return apply(bench.model, steps)
    raise SystemExit(f"merging must reach {share}, but cannot")


def other(name: str, ridge: bool) -> Callable[[Bench, int, float], nn.Module]:
    """Another method, with or without compensation after it; taylor draws its labels from the model, as ours does."""

    def made(bench: Bench, draw: int, share: float) -> nn.Module:
        images, _, numbers = drawn(bench, draw)
        others = sorted(set(range(len(bench.images))) - set(numbers))[:200]
        data = Data(
            train=None,
            calibration=bench.train.pick(numbers),
            validation=bench.train.pick(others),
            input=bench.input,
        )
        # A search of policies by their loss on 200 other images, without any training.
        search = {"trials": 30, "initial": 15, "measure": "loss"}
        settings = {"taylor": {"target": "output"}, "mdc": search}.get(name, {})
        found = methods.get(name, settings).search(bench.model, data, Budget(macs=share), seed=draw)
        grafts = recovered(bench.model, found.plan, images, seed=draw) if ridge else {}
        return apply(bench.model, found.plan, grafts=grafts)

    return made


def torch_pruned(bench: Bench, _draw: int, share: float) -> nn.Module:
    """Torch-Pruning at the largest ratio grid point within the budget; a plain timm model with narrower layers."""
    whole = measure.counted(bench.model).macs
    low, high, best = 0.0, 0.95, None
    for _ in range(7):
        ratio = (low + high) / 2
        child = _torch_pruned(bench, _draw, ratio)
        if measure.counted(child).macs > share * whole:
            low = ratio
        else:
            high, best = ratio, child
    if best is None:
        raise SystemExit(f"Torch-Pruning must reach {share}, but does not")
    return best


def _torch_pruned(bench: Bench, draw: int, ratio: float) -> nn.Module:
    import torch_pruning

    host = timm.create_model("vit_tiny_patch16_224")
    host.load_state_dict(load_file(bench.weights))
    attentions = [block.attn for block in host.blocks]
    for attention in attentions:
        attention.fused_attn = False  # its graph must be traced
    importance = torch_pruning.importance.GroupTaylorImportance()
    pruner = torch_pruning.pruner.BasePruner(
        host,
        torch.zeros(1, 3, 224, 224),
        importance,
        global_pruning=False,
        pruning_ratio=ratio,
        # The stream keeps its width, as with every other method here.
        ignored_layers=[
            host.head,
            host.patch_embed.proj,
            *(a.proj for a in attentions),
            *(b.mlp.fc2 for b in host.blocks),
        ],
        num_heads={attention.qkv: attention.num_heads for attention in attentions},
        prune_head_dims=True,
        round_to=1,
    )
    images, _, _ = drawn(bench, draw)
    generator = torch.Generator().manual_seed(draw)
    for x in images:
        logits = host(x)
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        F.cross_entropy(logits, labels, reduction="sum").backward()
    pruner.step()
    for attention in attentions:
        attention.head_dim = attention.qkv.out_features // (3 * attention.num_heads)
        attention.attn_dim = attention.head_dim * attention.num_heads
        attention.fused_attn = True
    return host.eval().requires_grad_(False)


def distilled(bench: Bench, draw: int, share: float) -> nn.Module:
    """The joint model after four minutes on the training images and their mirror images, without labels."""
    path = bench.out / f"joint-{draw}-{share}.safetensors"
    child = store.load(path) if path.is_file() else joint(bench, draw, share)
    child.requires_grad_(True)
    fitted = fit(child, bench.train, Train(**DISTILLED, minutes=4), input=bench.input, seed=draw, teacher=bench.model)
    print(f"{fitted.steps} steps in {fitted.seconds:.0f} s")
    return fitted.model.eval()


KINDS: dict[str, Callable[[Bench, int, float], nn.Module]] = {
    "joint": joint,
    "tabled": lambda bench, draw, share: joint(bench, draw, share, table=0),
    "widths": lambda bench, draw, share: joint(bench, draw, share, merge="none"),
    "widths_prefix": lambda bench, draw, share: joint(bench, draw, share, merge="none", exact=True),
    "widths_400": lambda bench, draw, share: joint(bench, draw, share, merge="none", count=400),
    "grid": lambda bench, draw, share: joint(bench, draw, share, merge="grid"),
    "merging": merged,
    "constant": constant,
    "taylor": other("taylor", False),
    "taylor_ridge": other("taylor", True),
    "magnitude": other("magnitude", False),
    "magnitude_ridge": other("magnitude", True),
    "mdc": other("mdc", False),
    "mdc_ridge": other("mdc", True),
    "torch_pruning": torch_pruned,
    "distil4": distilled,
}


def divergences(dense: Tensor, logits: Tensor) -> Tensor:
    """Divergence from the dense output, image by image."""
    ours, theirs = logits.double().log_softmax(-1), dense.double().log_softmax(-1)
    return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)


def stored(path: Path) -> nn.Module:
    """A model of the folder; what is no model of ours lies there as a pickle."""
    if path.suffix == ".pt":
        model: nn.Module = torch.load(path, weights_only=False).eval()
        return model
    return store.load(path)


def made(bench: Bench, kind: str, draw: str, share: str) -> tuple[nn.Module, float]:
    """The model of a task, from the folder or new, and the seconds that it took."""
    path = bench.out / f"{kind}-{draw}-{share}.{'pt' if kind == 'torch_pruning' else 'safetensors'}"
    if not path.is_file():
        start = time.perf_counter()
        child = KINDS[kind](bench, int(draw), float(share))
        seconds = time.perf_counter() - start
        if path.suffix == ".pt":
            torch.save(child, path)
        else:
            store.save(child, path, provenance={"seconds": seconds})
    known = {} if path.suffix == ".pt" else store.provenance(path).get("given", {})
    return stored(path), float(known.get("seconds", 0.0))


def record(bench: Bench, kind: str, draw: str, share: str) -> dict[str, Any]:
    """Measure the model of a task."""
    child, seconds = made(bench, kind, draw, share)
    logits = logits_of(child, bench.test.split(BATCH))
    apart = divergences(bench.dense, logits)
    torch.save(apart, bench.out / f"{kind}-{draw}-{share}.kl")
    hits, before = ((x.argmax(-1) == bench.labels).double() * 100 for x in (logits, bench.dense))
    root = len(hits) ** 0.5
    found: dict[str, Any] = {
        "kind": kind,
        "draw": int(draw),
        "budget": float(share),
        "macs_ratio": measure.counted(child).macs / measure.counted(bench.model).macs,
        "top1": float(hits.mean()),
        "top1_dense": float(before.mean()),
        "change": float((hits - before).mean()),
        "change_error": float((hits - before).std()) / root,
        "kl": float(apart.mean()),
        "kl_error": float(apart.std()) / root,
        "agreement": 100 * float((logits.argmax(-1) == bench.dense.argmax(-1)).double().mean()),
    }
    if seconds:
        found["seconds"] = round(seconds, 1)
    if kind != "torch_pruning":
        found["merges"] = [getattr(block.tokens, "count", 0) for _, _, block in describe(child).blocks()]
    rival = bench.out / f"merging-{draw}-{share}.kl"
    if kind in ("joint", "tabled", "distil4") and rival.is_file():
        gap = apart - torch.load(rival)
        found |= {"kl_over_merging": float(gap.mean()), "kl_over_merging_error": float(gap.std()) / root}
    return found | versions()


def versions() -> dict[str, Any]:
    """What a figure was taken with."""
    today = datetime.date.today().isoformat()
    return {"threads": torch.get_num_threads(), "torch": torch.__version__, "timm": timm.__version__, "date": today}


def timed(bench: Bench, path: Path) -> dict[str, Any]:
    """Latency next to the dense model."""
    kind, draw, share = path.stem.split("-")
    taken = measure.latency(stored(path), bench.model, image=(3, 224, 224), batch=8, threads=1, seconds=6)
    return {
        "kind": kind,
        "draw": int(draw),
        "budget": float(share),
        "latency_ratio": taken.ratio,
        "latency_ratio_low": taken.ratio_low,
        "latency_ratio_high": taken.ratio_high,
        "device": taken.device,
        **versions(),
        "threads": taken.threads,
    }


def key(line: dict[str, Any]) -> tuple[str, float, int]:
    """By what lines are ordered and known."""
    return line["kind"], line["budget"], line["draw"]


def read(path: Path) -> list[dict[str, Any]]:
    """Lines of a file of results."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def append(path: Path, line: dict[str, Any]) -> None:
    """Add a line at once, so that nothing is lost where the rest is stopped."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)


def table(lines: list[dict[str, Any]], times: list[dict[str, Any]]) -> str:
    """Markdown, a row a task."""
    ratio = {key(line): line["latency_ratio"] for line in times}
    rows = [
        "| kind | budget | draw | MACs | latency | top-1 | change | KL | KL less merging's |",
        "| --- |" + " ---: |" * 8,
    ]
    for line in sorted(lines, key=lambda line: (line["kind"], -line["budget"], line["draw"])):
        over = line.get("kl_over_merging")
        cells = [
            line["kind"],
            line["budget"],
            line["draw"],
            f"{line['macs_ratio']:.3f}",
            f"{ratio[key(line)]:.2f}" if key(line) in ratio else "-",
            f"{line['top1']:.1f}",
            f"{line['change']:+.1f} ± {line['change_error']:.1f}",
            f"{line['kl']:.3f} ± {line['kl_error']:.3f}",
            "-" if over is None else f"{over:+.3f} ± {line['kl_over_merging_error']:.3f}",
        ]
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(rows)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("weights", "train", "test"):
        parser.add_argument(name)
    parser.add_argument("--out", type=Path, required=True)
    joints = [f"{kind}:0:{share}" for share in (0.7, 0.6, 0.5, 0.4) for kind in ("merging", "constant", "joint")]
    parser.add_argument("--tasks", nargs="+", default=[*joints, "distil4:0:0.4"])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--latency", action="store_true")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.table:
        print(table(read(args.results), read(TIMES)))
        return
    bench = opened(args.weights, args.train, args.test, args.out)
    if args.latency:
        models = [path for end in ("safetensors", "pt") for path in sorted(args.out.glob(f"*-*-*.{end}"))]
        for path in models:
            append(TIMES, timed(bench, path))
        return
    done = {key(line) for line in read(args.results)}
    for kind, draw, share in (task.split(":") for task in args.tasks):
        if (kind, float(share), int(draw)) not in done:
            append(args.results, record(bench, kind, draw, share))


if __name__ == "__main__":
    main()
