"""Try many mutated files: ``python -m tests.fuzz --cases 500``; exits 1 if one ended otherwise than it must."""

import argparse
import json
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.fuzz.kinds import KINDS, attempt, samples


def counted(kinds: list[str], first: int, cases: int) -> dict[str, dict[str, Any]]:
    """Try `cases` mutations of each kind, and return for each how many were read, refused and wrong."""
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as root:
        known = samples(Path(root))
        for kind in kinds:
            ends: Counter[str] = Counter()
            wrong, slowest, start = [], 0.0, time.perf_counter()
            for number in range(first, first + cases):
                with tempfile.TemporaryDirectory() as place:
                    (Path(place) / "case").mkdir()
                    case = attempt(kind, number, known[kind], Path(place) / "case")
                ends["wrong" if case.wrong else case.end] += 1
                slowest = max(slowest, case.seconds)
                if case.wrong:
                    wrong.append(f"{kind} {number}: {case.end}")
                    sys.stderr.write(wrong[-1] + "\n")
            found[kind] = {
                "cases": cases,
                "read": ends["read"],
                "refused": ends["refused"],
                "wrong": wrong,
                "slowest_seconds": round(slowest, 2),
                "seconds": round(time.perf_counter() - start, 1),
                "peak_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            }
            sys.stderr.write(f"{kind}: {ends['read']} read, {ends['refused']} refused, {len(wrong)} wrong\n")
    return found


def main() -> None:
    """Read the options, try, and print the counts as JSON."""
    asked = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    asked.add_argument("--cases", type=int, default=500, help="mutations of each kind")
    asked.add_argument("--first", type=int, default=0, help="number of the first mutation")
    asked.add_argument("--kind", choices=list(KINDS), action="append", help="a kind; repeat for several")
    given = asked.parse_args()
    found = counted(given.kind or list(KINDS), given.first, given.cases)
    sys.stdout.write(json.dumps(found, indent=1) + "\n")
    sys.exit(any(each["wrong"] for each in found.values()))


if __name__ == "__main__":
    main()
