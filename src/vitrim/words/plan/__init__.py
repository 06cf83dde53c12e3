"""What to cut from a model: the same tree as a spec, with one decision for each block.

H heads, K channels of a head, M hidden neurons. Kept indices are indices into the parent, from 0, increasing.

A plan is a tree and not a list of edits, so the order of cuts does not matter. None leaves a part unchanged. Plans are
computed without weights: `child` returns the spec of the smaller model, and `then` composes two plans.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field

from vitrim.words.errors import PlanError
from vitrim.words.formats import FORMAT, check_format, parse_spec
from vitrim.words.plain import Node, dump, load, read_json, write_json
from vitrim.words.plan.kept import Kept, check_kept, composed, narrowed
from vitrim.words.plan.tokens import check_head, check_stage, with_steps
from vitrim.words.spec import Attention, Block, Conv, Form, Skip, Spec
from vitrim.words.steps import Step

__all__ = ["BlockPlan", "Kept", "Plan", "StagePlan", "read_made_from", "read_plan", "write_plan"]


class BlockPlan(Node):
    """What to cut from one block. None leaves a part unchanged.

    Attributes:
        qk: kept query and key channels of each head of the parent.
        v: kept value channels of each head of the parent. A head with no channels in `qk` and `v` is removed. If all
            heads are removed, the output bias stays.
        mixer: a skip removes the branch with its bias. A convolution replaces an attention and is made from the value
            channels that `v` keeps, or it is a later state of the block's convolution.
        hidden: kept neurons. If the tuple is empty, the output bias of the MLP stays.
        mlp: a skip removes the branch with its bias. If both branches are skipped, the block computes nothing, but it
            stays in the spec, so that the paths of other blocks do not change.
        tokens: the token step of the block, which drops or merges tokens. Dropped patches are given by their positions
            in the dense grid, and later blocks cannot use them again.
        only_prefix: whether the last block computes the prefix tokens only.
    """

    qk: tuple[Kept, ...] | None = None
    v: tuple[Kept, ...] | None = None
    mixer: Annotated[Conv | Skip, Field(discriminator="kind")] | None = None
    hidden: Kept | None = None
    mlp: Skip | None = None
    tokens: Step | None = None
    only_prefix: bool = False

    def child(self, block: Block, form: Form, at: str) -> Block:
        """Return the block that this plan makes from `block`; its token step is not changed here."""
        update = {"mixer": self._mixer(block, form, at), "hidden": self._hidden(block, form, at)}
        return block.model_copy(update=update | {"only_prefix": block.only_prefix or self.only_prefix})

    def _mixer(self, block: Block, form: Form, at: str) -> Attention | Conv | Skip:
        mixer = block.mixer
        if isinstance(self.mixer, Conv):
            return self._conv(self.mixer, mixer, form, at)
        if self.mixer is not None:
            if self.qk is not None or self.v is not None:
                raise PlanError(f"{at}: a skipped mixer must keep no channels, but qk or v is given; leave them out")
            if self.mixer.leaves == "norm" and not _reads(mixer):
                raise PlanError(f"{at}.mixer: a skip that leaves its norm must have one, but the branch has none")
            return self.mixer
        if self.qk is None and self.v is None:
            return mixer
        if not isinstance(mixer, Attention):
            raise PlanError(f"{at}: channels must be kept of an attention, but the block's mixer is {mixer.kind}")
        return self.attention(mixer, form, at)

    def _conv(self, conv: Conv, mixer: Attention | Conv | Skip, form: Form, at: str) -> Conv:
        reads = conv.prefix == "attention"
        if self.qk is not None and not reads:
            raise PlanError(f"{at}.qk: a convolution has no queries and keys to keep, but qk is given; leave it out")
        if isinstance(mixer, Conv):
            conv = conv.model_copy(update={"heads": conv.heads or mixer.heads}) if reads else conv
            state = {"mixture": conv.mixture, "norm": conv.norm}
            later = (conv.mixture in (mixer.mixture, None), conv.norm <= mixer.norm, self.v is None, self.qk is None)
            if not all(later) or mixer.model_copy(update=state) != conv:
                raise PlanError(f"{at}.mixer: a convolution must stay as it is or be folded, but another is requested")
            return conv
        if not isinstance(mixer, Attention):
            raise PlanError(f"{at}.mixer: a convolution must be made of an attention, but the mixer is {mixer.kind}")
        made_of = self.attention(mixer, form, at)
        widths = [n for n in made_of.v if n]
        if form.mixed_norm is not None:
            raise PlanError(
                f"{at}.mixer: a convolution must be made of values that go straight to the output projection, but "
                "there is a norm over all heads in between; keep attention here"
            )
        if not widths:
            raise PlanError(f"{at}.mixer: a convolution must be made of value heads, but none is left; keep one in v")
        if conv.mixture is not None and set(widths) != {conv.width}:
            raise PlanError(
                f"{at}.mixer: a mixture must be as wide as every value head, but is {conv.width} wide for heads of "
                f"{', '.join(map(str, widths))} channels; keep one width in v, or leave the mixture out"
            )
        if conv.mixture is not None and conv.mixture.heads != len(widths):
            raise PlanError(
                f"{at}.mixer: a mixture must be one of the {len(widths)} heads, but is of {conv.mixture.heads}"
            )
        if reads and conv.heads not in (None, made_of):
            raise PlanError(
                f"{at}.mixer: heads must be those that qk and v keep, but others are named; leave heads out"
            )
        return conv.model_copy(update={"heads": made_of}) if reads else conv

    def attention(self, mixer: Attention, form: Form, at: str) -> Attention:
        """Return the attention that has only the kept channels of `mixer`."""
        qk, v = self.heads(mixer)
        for name, kept, widths in (("qk", qk, mixer.qk), ("v", v, mixer.v)):
            if len(kept) != len(widths):
                raise PlanError(
                    f"{at}.{name}: kept channels must be given for each of {len(widths)} heads, but got {len(kept)}"
                )
            for head, (indices, width) in enumerate(zip(kept, widths, strict=True)):
                check_kept(indices, width, f"{at}.heads.{head}.{name}")
        for head, (a, b) in enumerate(zip(qk, v, strict=True)):
            if bool(a) != bool(b):
                raise PlanError(
                    f"{at}.heads.{head}: a head must keep channels of both qk and v or of neither, "
                    f"but keeps {len(a)} and {len(b)}"
                )
        if not isinstance(self.mixer, Conv):
            self._tied(form, mixer, qk, v, at)
        living = [head for head, kept in enumerate(v) if kept]
        return mixer.of(living, [len(qk[i]) for i in living], [len(v[i]) for i in living])

    def _tied(self, form: Form, mixer: Attention, qk: Sequence[Kept], v: Sequence[Kept], at: str) -> None:
        if form.ties_qk:
            what = "channels under a q/k norm" if form.head_norm is not None else "channels that turn with their places"
            for head, kept in enumerate(qk):
                if kept and len(kept) < mixer.qk[head]:
                    raise PlanError(
                        f"{at}.heads.{head}.qk: {what} must be kept together, but "
                        f"{len(kept)} of {mixer.qk[head]} are; cut v, or the whole head"
                    )
        if form.mixed_norm is not None and tuple(map(len, v)) != mixer.v:
            raise PlanError(
                f"{at}.v: channels under a norm over all heads must be kept together, but {sum(map(len, v))} of "
                f"{sum(mixer.v)} are; cut qk, or skip the mixer"
            )

    def _hidden(self, block: Block, form: Form, at: str) -> int | None:
        if self.mlp is not None:
            if self.mlp.leaves != "zero":
                raise PlanError(f"{at}.mlp: a skipped MLP must leave nothing, but leaves its {self.mlp.leaves}")
            if self.hidden is not None:
                raise PlanError(f"{at}: a skipped MLP must keep no neurons, but hidden is given; leave it out")
            return None
        if self.hidden is None:
            return block.hidden
        if block.hidden is None:
            raise PlanError(f"{at}.hidden: neurons must be kept of an MLP, but the block has none")
        check_kept(self.hidden, block.hidden, f"{at}.hidden")
        if form.hidden_norm is not None and len(self.hidden) != block.hidden:
            raise PlanError(
                f"{at}.hidden: neurons under a norm must be kept together, but {len(self.hidden)} of {block.hidden} "
                "are; skip the mlp"
            )
        return len(self.hidden)

    def heads(self, mixer: Attention) -> tuple[tuple[Kept, ...], tuple[Kept, ...]]:
        """Return the kept (qk, v) channels of every head of `mixer`; None becomes all channels.

        If only one of the two is given, a head with no channels in it has none in the other, either.
        """
        qk = self.qk if self.qk is not None else _follow(mixer.qk, self.v)
        v = self.v if self.v is not None else _follow(mixer.v, self.qk)
        return qk, v

    def then(self, later: Self, block: Block, at: str) -> Self:
        """Return one decision that equals this one followed by `later`, where `block` is the parent's block.

        Token steps depend on the blocks before, so `Plan.then` composes them.
        """
        update: dict[str, Any] = {"only_prefix": self.only_prefix or later.only_prefix}
        if isinstance(later.mixer, Skip) or isinstance(self.mixer, Skip):
            update |= {"mixer": later.mixer or self.mixer, "qk": None, "v": None}
        elif isinstance(self.mixer, Conv):
            update |= {"mixer": later.mixer or self.mixer}
        elif isinstance(later.mixer, Conv) and isinstance(block.mixer, Attention):
            (qk, v), cut = self.heads(block.mixer), self.qk is not None or self.v is not None
            living = [head for head, kept in enumerate(v) if kept]
            small = block.mixer.of(living, [len(qk[i]) for i in living], [len(v[i]) for i in living])
            chosen = later.heads(small)
            made: list[tuple[Kept, ...] | None] = [
                _compose(kept, living, own, f"{at}.{name}") if cut else own if given is not None else None
                for name, kept, own, given in zip(("qk", "v"), (qk, v), chosen, (later.qk, later.v), strict=True)
            ]
            reads = later.mixer.prefix == "attention"
            update |= {"mixer": later.mixer, "qk": made[0] if reads else None, "v": made[1]}
        elif later.mixer is not None:
            update |= {"mixer": later.mixer}
        elif (later.qk is not None or later.v is not None) and isinstance(block.mixer, Attention):
            qk, v = self.heads(block.mixer)
            living = [head for head, kept in enumerate(v) if kept]
            small = Attention(
                qk=tuple(len(qk[i]) for i in living), v=tuple(len(v[i]) for i in living), scale=block.mixer.scale
            )
            later_qk, later_v = later.heads(small)
            update["qk"] = _compose(qk, living, later_qk, f"{at}.qk")
            update["v"] = _compose(v, living, later_v, f"{at}.v")
        if later.mlp is not None or self.mlp is not None:
            update |= {"mlp": Skip(), "hidden": None}
        elif later.hidden is not None:
            mine = self.hidden if self.hidden is not None else tuple(range(block.hidden or 0))
            check_kept(later.hidden, len(mine), f"{at}.hidden")
            update["hidden"] = tuple(mine[i] for i in later.hidden)
        return self.model_copy(update=update)


class StagePlan(Node):
    """The blocks of one stage, and the channels of its residual stream.

    Attributes:
        blocks: the decision for each block.
        width: kept channels of the residual stream, at least one; None keeps all. Everything that reads or writes the
            stream follows: all branches, norms, embeddings, positions and the head. Norms run over what is kept, so the
            child equals the parent with the other channels masked and left out of the norms' statistics.
    """

    blocks: tuple[BlockPlan, ...]
    width: Kept | None = None


class Plan(Node):
    """What to cut from a model."""

    stages: tuple[StagePlan, ...]

    @classmethod
    def keep(cls, spec: Spec) -> Self:
        """Return the plan that changes nothing."""
        return cls(stages=tuple(StagePlan(blocks=(BlockPlan(),) * len(stage.blocks)) for stage in spec.stages))

    @classmethod
    def of(cls, spec: Spec, blocks: Sequence[BlockPlan], widths: Sequence[Kept | None] | None = None) -> Self:
        """Return the plan with the given decisions, one for each block of `spec`, in order over all stages.

        Args:
            spec: the model to cut.
            blocks: the decisions.
            widths: kept channels of the residual stream of each stage; None keeps all.

        Raises:
            PlanError: if the number of decisions is not the number of blocks.
        """
        if len(blocks) != len(spec.blocks()):
            raise PlanError(
                f"a plan must decide for each of {len(spec.blocks())} blocks, but decides for {len(blocks)}"
            )
        rest = iter(blocks)
        kept = [None] * len(spec.stages) if widths is None else widths
        return cls(
            stages=tuple(
                StagePlan(blocks=tuple(next(rest) for _ in stage.blocks), width=width)
                for stage, width in zip(spec.stages, kept, strict=True)
            )
        )

    def widths(self) -> list[Kept | None]:
        """Return the kept channels of the residual stream of each stage; None keeps all."""
        return [stage.width for stage in self.stages]

    def blocks(self) -> list[BlockPlan]:
        """Return every decision, in order over all stages."""
        return [block for stage in self.stages for block in stage.blocks]

    def check_shape(self, spec: Spec) -> None:
        """Raise if `spec` has other stages or another number of blocks.

        Raises:
            PlanError: if so; the message names both shapes.
        """
        mine, theirs = [len(s.blocks) for s in self.stages], [len(s.blocks) for s in spec.stages]
        if mine != theirs:
            raise PlanError(
                f"stages: the plan must decide for the model's blocks {theirs}, but decides for {mine}; "
                "it was made for another model"
            )

    def child(self, spec: Spec) -> Spec:
        """Return the spec of the smaller model, computed without weights.

        Raises:
            PlanError: if the plan does not fit `spec` or cuts something that cannot be cut; the message names the path.
        """
        self.check_shape(spec)
        stages = []
        for i, (mine, stage) in enumerate(zip(self.stages, spec.stages, strict=True)):
            blocks = tuple(
                plan.child(block, stage.form, f"stages.{i}.blocks.{j}")
                for j, (plan, block) in enumerate(zip(mine.blocks, stage.blocks, strict=True))
            )
            blocks = with_steps(blocks, mine.blocks, stage, f"stages.{i}.blocks")
            width = narrowed(mine.width, stage.width, spec.host, f"stages.{i}.width")
            stages.append(stage.model_copy(update={"blocks": blocks, "width": width}))
            check_stage(stages[-1], spec, f"stages.{i}.blocks")
        check_head(stages, spec)
        before, after = ([stage.width for stage in own] for own in (spec.stages, stages))
        host = spec.host if before == after else spec.host.narrowed(before, after)
        return spec.model_copy(update={"stages": tuple(stages), "host": host})

    def then(self, later: Self, spec: Spec) -> Self:
        """Return one plan that equals this one followed by `later`.

        One exception: where norms follow the branches, a branch that loses all its channels leaves a constant that its
        norm gives over the residual width of that moment. If `later` cuts that width, the one plan leaves another.

        Args:
            later: a plan for the child of this one.
            spec: the parent of this plan, needed because `later` can cut parts that this plan leaves unchanged.
        """
        small = self.child(spec)
        final = later.child(small)
        stages: list[StagePlan] = []
        for i, (mine, next_, stage) in enumerate(zip(self.stages, later.stages, spec.stages, strict=True)):
            blocks = tuple(
                a.then(b, block, f"stages.{i}.blocks.{j}").model_copy(
                    update={"tokens": None if last.tokens == block.tokens else last.tokens}
                )
                for j, (a, b, block, last) in enumerate(
                    zip(mine.blocks, next_.blocks, stage.blocks, final.stages[i].blocks, strict=True)
                )
            )
            stages.append(StagePlan(blocks=blocks, width=composed(mine.width, next_.width, f"stages.{i}.width")))
        return self.model_copy(update={"stages": tuple(stages)})


def _reads(mixer: Attention | Conv | Skip) -> bool:
    """Return whether a branch has a norm before it."""
    return bool(mixer.v) if isinstance(mixer, Attention) else isinstance(mixer, Conv) or mixer.leaves == "norm"


def _follow(widths: tuple[int, ...], other: tuple[Kept, ...] | None) -> tuple[Kept, ...]:
    if other is None or len(other) != len(widths):
        return tuple(tuple(range(width)) for width in widths)
    return tuple(tuple(range(width)) if kept else () for width, kept in zip(widths, other, strict=True))


def _compose(first: Sequence[Kept], living: Sequence[int], later: Sequence[Kept], at: str) -> tuple[Kept, ...]:
    composed: list[Kept] = [()] * len(first)
    for head, kept in zip(living, later, strict=True):
        check_kept(kept, len(first[head]), at)
        composed[head] = tuple(first[head][i] for i in kept)
    return tuple(composed)


class _Sheet(Node):
    """The content of ``plan.json``: a plan with the model it is for."""

    format: int = 1
    parent: dict[str, Any]
    plan: Plan
    made_from: dict[str, str] = Field(default_factory=dict)


def write_plan(path: Path, parent: Spec, plan: Plan, made_from: Mapping[str, str] | None = None) -> None:
    """Write a plan together with the spec it is for.

    Args:
        path: file to write.
        parent: spec of the dense model.
        plan: the plan.
        made_from: fingerprints of the parent's weights, the images and the teacher that the plan was found with.
    """
    more = {"made_from": dict(made_from)} if made_from else {}
    write_json(path, {"format": FORMAT, "parent": dump(parent), "plan": dump(plan), **more})


def read_plan(path: Path) -> tuple[Spec, Plan]:
    """Read a file of `write_plan`, also of an older version, and check the plan against its parent.

    Raises:
        PlanError: if the file is missing, malformed, of a newer version, or its plan does not fit its parent.
    """
    parent, sheet = _read(path)
    return parent, sheet.plan


def read_made_from(path: Path) -> dict[str, str]:
    """Read the fingerprints in a file of `write_plan`; empty if it has none.

    Raises:
        PlanError: as `read_plan`.
    """
    return _read(path)[1].made_from


def _read(path: Path) -> tuple[Spec, _Sheet]:
    data = read_json(path, PlanError)
    known = data if isinstance(data, dict) else {}
    check_format(known.get("format", 1), str(path), PlanError)
    if "parent" in known:
        parent = parse_spec(known["parent"], PlanError, f"{path}.parent")
    sheet = load(_Sheet, data, PlanError, at=str(path))
    sheet.plan.child(parent)
    return parent, sheet
