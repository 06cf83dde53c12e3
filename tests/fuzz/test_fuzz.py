"""A few hundred mutated files, in this process; `python -m tests.fuzz` tries thousands."""

from pathlib import Path

import pytest

from tests.fuzz.kinds import KINDS, attempt, samples

CASES = dict.fromkeys(KINDS, 40) | {"log": 12}


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A sound sample of each kind."""
    return samples(tmp_path_factory.mktemp("samples"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_a_mutated_file_is_read_or_refused_in_a_sentence(kind, known, tmp_path):
    place = tmp_path / "whole"
    place.mkdir()
    KINDS[kind].read(known[kind], place / "out")  # the sample itself is sound
    wrong = []
    for number in range(CASES[kind]):
        here = tmp_path / str(number) / "case"
        here.mkdir(parents=True)
        case = attempt(kind, number, known[kind], here)
        if case.wrong:
            wrong.append(f"python -m tests.fuzz --kind {kind} --first {number} --cases 1: {case.end}")
    assert not wrong
