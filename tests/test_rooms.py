"""Packages stand in one line: each imports only packages before it, no modules import each other in a circle, and the
words and the report answer without torch."""

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vitrim
import vitrim.words.errors
import vitrim.words.steps

SOURCE = Path(vitrim.__file__).parent
ROOMS = "words report nn families cut data train measure deploy methods run testing cli demo hub".split()
WORDS = frozenset({"words"})
DOORS = frozenset({"", "__main__"})
STRANGERS = frozenset({"methods", "families"})
HEAVY = frozenset({"torch", "torchvision", "timm", "accelerate"})
LONGEST = 400
WIDEST = 15


def modules() -> list[str]:
    """Every module below vitrim, as a dotted name without the leading ``vitrim``."""
    return sorted(dotted(path.relative_to(SOURCE)) for path in SOURCE.rglob("*.py"))


def dotted(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def file_of(module: str) -> Path:
    path = SOURCE.joinpath(*module.split(".")) if module else SOURCE
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imports(source: str) -> Iterator[str]:
    """Every name that `source` imports at any depth; ``from a import b`` gives ``a.b``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from (f"{base}.{alias.name}" for alias in node.names)


def room_of(module: str) -> str:
    return module.split(".")[0]


def complaints(module: str, source: str) -> list[str]:
    """What is wrong with the imports of `module`, in sentences; empty if there is nothing wrong."""
    return [text for name in imports(source) if (text := complaint(module, name))]


def complaint(module: str, name: str) -> str | None:
    room, first = room_of(module), name.split(".")[0]
    if name.startswith("."):
        return f"{module} imports {name}: imports must be absolute"
    if first in HEAVY and (room in WORDS or room == "report"):
        return f"{module} imports {name}: the words and the report must answer without torch"
    if first != "vitrim" or room in DOORS or name == "vitrim.__version__":
        return None
    theirs = name.split(".")[1:]
    if not theirs or theirs[0] not in ROOMS:
        return f"{module} imports {name}: a room must import rooms, not the front door"
    if theirs[0] == room:
        return _neighbour(module, theirs)
    if room not in ROOMS:
        return f"{module} is in no room: name '{room}' in the line of rooms"
    if room == "report" and theirs[0] not in WORDS:
        return f"{module} imports {name}: the report must import only the words"
    if ROOMS.index(theirs[0]) > ROOMS.index(room):
        return f"{module} imports {name}: {room} must lean only on rooms before it"
    return None


def _neighbour(module: str, theirs: list[str]) -> str | None:
    """Files of a package may import each other, except where each must stand alone."""
    room, *mine = module.split(".")
    if room not in STRANGERS or not mine:
        return None
    other = file_of(".".join(theirs[:2]))
    if len(theirs) > 1 and other.exists() and theirs[1] != mine[0] and not theirs[1].startswith("_"):
        return f"{module} imports vitrim.{'.'.join(theirs)}: files of {room} must not import one another"
    return None


def import_graph() -> dict[str, set[str]]:
    """The modules that each module of vitrim imports, at any depth of its code."""
    known = set(modules())
    graph: dict[str, set[str]] = {}
    for module in known - DOORS:
        graph[module] = set()
        for name in imports(file_of(module).read_text(encoding="utf-8")):
            first, *rest = name.split(".")
            if first == "vitrim" and rest:
                # ``from a import b`` names the module a.b where there is one, else something that a defines.
                longest = next((n for n in range(len(rest), 0, -1) if ".".join(rest[:n]) in known), 0)
                graph[module] |= {".".join(rest[:longest])} - {module, ""}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import one another, directly or through others."""
    reach = {module: _reachable(graph, module) for module in graph}
    groups = {tuple(sorted(m for m in reach[a] if a in reach[m])) for a in graph if a in reach[a]}
    return [list(group) for group in sorted(groups)]


def _reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    todo = list(graph.get(start, ()))
    while todo:
        module = todo.pop()
        if module not in found:
            found.add(module)
            todo += graph.get(module, ())
    return found


def test_no_modules_import_each_other_in_a_circle():
    assert circles(import_graph()) == []


def test_a_circle_is_seen():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []


def step_kinds() -> dict[str, str]:
    """The field `kind` of every token step, by the name of its file."""
    return {name: kind.model_fields["kind"].default for name, kind in vitrim.words.steps.kinds().items()}


def named_steps(source: str) -> set[str]:
    """Token steps that a source names: it imports one of their two files, or compares a `kind` with theirs."""
    kinds = step_kinds()
    found = set()
    for name in imports(source):
        parts = name.split(".")
        if parts[1:3] in (["words", "steps"], ["nn", "steps"]):
            found |= set(parts[3:4]) & set(kinds)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare) and "kind" in ast.dump(node.left):
            found |= {leaf.value for leaf in ast.walk(node) if isinstance(leaf, ast.Constant)} & set(kinds.values())
    return found


@pytest.mark.parametrize("module", [module for module in modules() if room_of(module) not in ("methods", "testing")])
def test_only_its_two_files_and_methods_name_a_step(module: str):
    if ".steps." not in module:
        assert named_steps(file_of(module).read_text(encoding="utf-8")) == set()


def test_every_word_of_a_step_has_its_module():
    words, modules_ = ({path.name for path in (SOURCE / a / "steps").glob("[!_]*.py")} for a in ("words", "nn"))
    assert words == modules_
    assert len(step_kinds()) == len(words)


def test_a_named_step_is_seen():
    assert named_steps("from vitrim.words.steps.drop import Drop") == {"drop"}
    assert named_steps("from vitrim.nn.steps import merge") == {"merge"}
    assert named_steps("if step.kind == 'top_k': pass") == {"top_k"}
    assert named_steps("from vitrim.words.steps import Step, kinds") == set()


def too_long(source: str) -> bool:
    return len(source.splitlines()) > LONGEST


def bad_error(kind: type) -> bool:
    """Whether an error class is outside the tree, or is no builtin besides."""
    builtin = [base for base in kind.__mro__ if base.__module__ == "builtins" and issubclass(base, Exception)]
    return not issubclass(kind, vitrim.words.errors.VitrimError) or builtin in ([], [Exception])


@pytest.mark.parametrize("module", modules())
def test_a_room_leans_only_on_rooms_before_it(module: str):
    assert complaints(module, file_of(module).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("words.spec", "import vitrim.nn"),
        ("nn.block", "def f():\n    from vitrim.families import adopt"),
        ("nn.block", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from vitrim.train import fit"),
        ("nn.block", "from .axis import Axis"),
        ("nn.block", "import vitrim"),
        ("nn.block", "from vitrim import adopt"),
        ("report.page", "from vitrim.measure import cost"),
        ("report.page", "from vitrim.run.recipe import Recipe"),
        ("report.page", "import torch.nn as nn"),
        ("words.plan", "def f():\n    import timm"),
        ("cellar", "import vitrim.words.spec"),
        ("run", "from vitrim.cli import main"),
    ],
)
def test_a_wrong_import_is_seen(module: str, source: str):
    assert len(complaints(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("words.plan", "from vitrim.words.spec import Spec\nimport json"),
        ("nn.block", "from vitrim.nn.axis import Axis\nimport torch"),
        ("report.page", "from vitrim.words.plan import read_plan\nfrom vitrim.report.blocks import sheet"),
        ("deploy.store", "from vitrim import __version__"),
        ("demo", "from vitrim.cli import main"),
        ("", "from vitrim.cli import main"),
    ],
)
def test_a_right_import_passes(module: str, source: str):
    assert complaints(module, source) == []


def test_files_that_stand_alone_do_not_meet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(sys.modules[__name__], "SOURCE", tmp_path)
    (tmp_path / "methods").mkdir()
    for name in ("taylor", "random", "__init__", "_common"):
        (tmp_path / "methods" / f"{name}.py").touch()
    assert complaints("methods.taylor", "from vitrim.methods.random import Random")
    assert complaints("methods.taylor", "from vitrim.methods import random")
    assert not complaints("methods.taylor", "from vitrim.methods._common import helper")
    assert not complaints("methods.taylor", "from vitrim.methods import names")
    assert not complaints("methods", "from vitrim.methods import random")


@pytest.mark.parametrize("module", modules())
def test_no_file_is_long(module: str):
    assert not too_long(file_of(module).read_text(encoding="utf-8")), f"{module} must have at most {LONGEST} lines"


def test_a_long_file_is_seen():
    assert too_long("\n" * (LONGEST + 1))
    assert not too_long("\n" * LONGEST)


def test_the_front_door_is_narrow():
    names = getattr(vitrim, "__all__", [])
    assert len(names) <= WIDEST
    assert len(set(names)) == len(names)
    missing = [name for name in names if not hasattr(vitrim, name)]
    assert missing == []


def test_every_error_is_also_a_builtin():
    root = vitrim.words.errors.VitrimError
    kinds = [kind for _, kind in inspect.getmembers(vitrim.words.errors, inspect.isclass) if kind is not root]
    assert kinds
    assert [kind.__name__ for kind in kinds if bad_error(kind)] == []
    assert sorted(vitrim.words.errors.__all__) == sorted(kind.__name__ for kind in [root, *kinds])


def test_a_wrong_error_is_seen():
    assert bad_error(type("Outside", (ValueError,), {}))
    assert bad_error(type("Nothing", (vitrim.words.errors.VitrimError,), {}))
    assert not bad_error(type("Right", (vitrim.words.errors.VitrimError, ValueError), {}))


def loaded_after(statement: str) -> set[str]:
    """Heavy packages that a fresh interpreter holds after `statement`."""
    code = f"{statement}\nimport sys\nprint(*sorted(name for name in {sorted(HEAVY)} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_words_and_report_run_without_torch():
    light = [name for name in modules() if room_of(name) in WORDS or room_of(name) == "report"]
    assert loaded_after("import vitrim\n" + "\n".join(f"import vitrim.{name}" for name in light)) == set()


def test_the_sheet_runs_without_matplotlib():
    code = "import sys, vitrim.report.blocks; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_torch_is_seen_when_it_is_there():
    assert "torch" in loaded_after("import sys; sys.modules['torch'] = sys")
