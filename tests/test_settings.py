"""Settings say what they do: a key that is named changes that key alone, at every depth and wherever it is named."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from vitrim import methods
from vitrim.run.recipe import DataRecipe, Measure, ModelRecipe, Recipe, merged, overrides
from vitrim.run.transfer.recipe import TransferRecipe
from vitrim.train import Distill, Train
from vitrim.words.errors import MethodError, RecipeError
from vitrim.words.plain import NONE, Node, dump, load

LAWS = settings(deadline=None, database=None)
METHODS = methods.names()
TRAINING = [name for name in METHODS if "train" in methods.settings_of(name).model_fields]

OTHER = dump(
    Train(
        epochs=7, minutes=3, batch=48, accumulate=2, lr=3e-4, weight_decay=0.02, betas=(0.8, 0.99), warmup_epochs=0.5,
        warmup_lr=1e-7, min_lr=2e-7, schedule="poly", power=0.7, clip=2.0, mixup=0.3, cutmix=0.4, smoothing=0.05, ema=0.9,
        precision="bf16", drop_path=0.2, augment={"kind": "none", "hflip": 0.25, "shift": 0.1, "rotate": 3, "scale": 0.5,
        "auto": "", "jitter": 0.1, "erase": 0.1, "repeats": 2}, distill={"kind": "token", "alpha": 0.7, "temperature": 3},
        workers=1, checkpoint_every=5, keep=2, log_every=3,
    )
)  # fmt: skip
"""A valid training of which no value is any method's default."""


def leaves(table: Mapping[str, Any], at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every path to a value of nested tables, with the value."""
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, (*at, key))
        else:
            yield (*at, key), value


def nested(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """``{"a": {"b": value}}`` for the path ``("a", "b")``."""
    for key in reversed(path):
        value = {key: value}
    return value


def together(pairs: list[tuple[tuple[str, ...], Any]]) -> dict[str, Any]:
    whole: dict[str, Any] = {}
    for path, value in pairs:
        whole = merged(whole, nested(path, value))
    return whole


def recipe(**changes: Any) -> Recipe:
    asked = {"model": {"name": "test_vit"}, "method": {"name": "taylor"}, "budget": "macs=0.5"} | changes
    return load(Recipe, asked, RecipeError, at="recipe")


class TestOneKey:
    """Naming a key leaves all others as they were."""

    @pytest.mark.parametrize("name", METHODS)
    def test_a_key_named_with_its_default_changes_nothing(self, name):
        default = methods.get(name)
        for path, value in leaves(dump(default)):
            assert methods.get(name, nested(path, value)) == default, path
            if value is None:
                assert methods.get(name, nested(path, NONE)) == default, path

    @pytest.mark.parametrize("name", TRAINING)
    def test_no_value_of_the_other_training_is_a_default(self, name):
        theirs = dict(leaves(dump(methods.get(name))["train"]))
        assert [path for path, value in leaves(OTHER) if theirs[path] == value] == []

    @pytest.mark.parametrize("name", TRAINING)
    @given(st.data())
    @LAWS
    def test_named_keys_change_and_no_others(self, name, data):
        named = data.draw(st.lists(st.sampled_from(list(leaves(OTHER))), unique_by=lambda pair: pair[0]))
        over = {"train": together(named)}
        default = methods.get(name)
        assert dump(methods.get(name, over)) == merged(dump(default), over)

    @given(st.data())
    @LAWS
    def test_of_a_recipe_too(self, data):
        named = data.draw(st.lists(st.sampled_from(list(leaves(OTHER))), unique_by=lambda pair: pair[0]))
        over = together(named)
        assert dump(recipe(train=over).train) == merged(dump(Train(epochs=0)), over)

    def test_published_defaults_survive_a_named_epoch(self):
        slim = methods.get("vit_slim", {"train": {"epochs": 50}})
        assert slim == methods.get("vit_slim")
        train = methods.get("vit_slim", {"train": {"epochs": 3, "distill": {"alpha": 0.3}}}).train
        assert (train.epochs, train.batch, train.schedule, train.clip, train.mixup) == (3, 1024, "constant", None, 0.8)
        assert train.distill == Distill(kind="none", alpha=0.3)

    def test_the_command_line_lays_over_defaults_as_well(self):
        pairs = ["method.train.augment.hflip=0.5", "method.train.clip=none", "train.lr=1e-3", "measure.batch=2"]
        found = recipe(**merged({"method": {"name": "cait"}}, overrides(pairs))).resolved()
        train = found.found_method().train
        default = methods.get("cait").train
        assert train == default.model_copy(
            update={"clip": None, "augment": default.augment.model_copy(update={"hflip": 0.5})}
        )
        assert found.train == Train(epochs=0, lr=1e-3)
        assert found.measure == Measure(batch=2)

    def test_a_transfer_keeps_its_own_defaults(self):
        asked = {"model": {"name": "test_vit"}, "data": {"train": "scenes"}, "train": {"epochs": 2}}
        train = load(TransferRecipe, asked).train
        assert (train.epochs, train.batch, train.lr, train.schedule) == (2, 16, 2e-4, "poly")

    def test_values_may_be_none_and_nodes(self):
        assert methods.get("cait", {"train": {"clip": None}}).train.clip is None
        assert methods.get("vit_slim", {"train": {"clip": 1.0}}).train.clip == 1.0
        given_whole = methods.get("vit_slim", {"train": Train(epochs=2)})
        assert given_whole.train == Train(epochs=2)
        inside = methods.get("vit_slim", {"train": {"distill": Distill(kind="hard")}})
        assert inside.train == methods.get("vit_slim").train.model_copy(update={"distill": Distill(kind="hard")})
        assert recipe(teacher={"name": "a", "weights": "b"}).teacher == ModelRecipe(name="a", weights="b")
        assert recipe(teacher="none").teacher is None

    def test_wrong_keys_are_refused_at_every_depth(self):
        for over, told in (
            ({"train": {"epoch": 1}}, r"method.vit_slim.train: Train has no field 'epoch'; did you mean 'epochs'"),
            ({"train": {"distill": {"alfa": 1}}}, r"method.vit_slim.train.distill: Distill has no field 'alfa'"),
            ({"train": {"augment": {"kind": "ful"}}}, r"method.vit_slim.train.augment.kind: .* got 'ful'"),
            ({"train": 3}, r"method.vit_slim.train: this must be a table"),
            ({"train": None}, r"method.vit_slim.train: this must be a table"),
            ({"train": {"batch": 3}}, r"batch must be even for mixup and cutmix, but is 3"),
        ):
            with pytest.raises(MethodError, match=told):
                methods.get("vit_slim", over)


class TestWhole:
    """What was dumped reads as itself."""

    @pytest.mark.parametrize("name", METHODS)
    def test_dumped_methods(self, name):
        found = methods.get(name)
        assert load(type(found), dump(found)) == found
        assert type(found).model_validate(found.model_dump()) == found
        assert type(found).model_validate_json(found.model_dump_json()) == found

    @pytest.mark.parametrize("name", TRAINING)
    @given(st.data())
    @LAWS
    def test_dumped_methods_whatever_was_named(self, name, data):
        named = data.draw(st.lists(st.sampled_from(list(leaves(OTHER))), unique_by=lambda pair: pair[0]))
        found = methods.get(name, {"train": together(named)})
        assert methods.get(name, dump(found)) == found

    def test_dumped_recipes(self):
        for kind in (DataRecipe, Measure, Train):
            assert load(kind, dump(kind())) == kind()
        found = recipe(method={"name": "spvit", "train": {"epochs": 2}}, train={"clip": "none"}).resolved()
        assert load(Recipe, dump(found)).resolved() == found


class Round(Node):
    kind: Literal["round"] = "round"
    radius: float = 1.0
    rim: float | None = 0.1


class Square(Node):
    kind: Literal["square"] = "square"
    side: float = 1.0
    rim: float | None = 0.2


class Plate(Node):
    shape: Annotated[Round | Square, Field(discriminator="kind")] = Round(radius=5.0)
    maybe: Square | None = Square(side=7.0)
    free: dict[str, Any] = {"a": 1}  # noqa: RUF012 pydantic copies defaults
    stack: tuple[Square, ...] = (Square(side=2.0),)


class Table(Node):
    plate: Plate = Plate(shape=Square(side=3.0, rim=None), maybe=Square(side=8.0))


class TestUnions:
    """Kinds of a union are told apart before anything is laid over."""

    def test_the_same_kind_is_laid_over(self):
        assert Plate(shape={"rim": 0.5}).shape == Round(radius=5.0, rim=0.5)
        assert Plate(shape={"kind": "round", "rim": 0.5}).shape == Round(radius=5.0, rim=0.5)

    def test_another_kind_is_taken_by_itself(self):
        assert Plate(shape={"kind": "square"}).shape == Square()
        assert Table(plate={"shape": {"kind": "round"}}).plate == Plate(maybe=Square(side=8.0))
        assert Table(plate={"maybe": {"kind": "square", "rim": 1}}).plate.maybe == Square(side=8.0, rim=1.0)

    def test_the_outermost_default_counts(self):
        assert Table(plate={"shape": {"side": 4.0}}).plate == Plate(
            shape=Square(side=4.0, rim=None), maybe=Square(side=8.0)
        )
        assert Table(plate={"maybe": {"rim": "none"}}).plate.maybe == Square(side=8.0, rim=None)

    def test_none_is_none(self):
        assert Plate(maybe=None).maybe is None
        assert Plate(maybe="none").maybe is None
        assert Plate(shape={"rim": None}).shape == Round(radius=5.0, rim=None)

    def test_free_tables_and_lists_are_not_merged(self):
        assert Plate(free={"b": 2}).free == {"b": 2}
        assert Plate(stack=[{"rim": 0.5}]).stack == (Square(rim=0.5),)

    def test_wrong_kinds_and_keys_are_refused(self):
        with pytest.raises(RecipeError, match=r"\$\.shape: "):
            load(Plate, {"shape": {"kind": "oval"}})
        with pytest.raises(RecipeError, match=r"\$\.shape: Round has no field 'side'"):
            load(Plate, {"shape": {"side": 1}})

    @given(
        st.builds(
            Table,
            plate=st.builds(
                Plate,
                shape=st.builds(Round, radius=st.floats(0, 9)) | st.builds(Square, side=st.floats(0, 9)),
                maybe=st.none() | st.builds(Square, rim=st.none() | st.floats(0, 1)),
                free=st.dictionaries(st.text(), st.none() | st.integers()),
            ),
        )
    )
    @LAWS
    def test_whole_dumps_read_as_themselves(self, table):
        assert load(Table, dump(table)) == table
        assert Table.model_validate(table.model_dump()) == table
