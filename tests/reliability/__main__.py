"""Break every command on purpose and write what came of it into ``docs/reliability.md`` and ``docs/reliability.json``.

``python -m tests.reliability`` takes an hour or two on two cores; ``--kills 5 --stops 5 --sizes 4 --moments 2
--fuzz 50`` a few minutes. It needs Linux with user namespaces (``unshare``), in which it mounts small disks in memory,
and no rights.
"""

import argparse
import datetime
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

MARKS = ("<!-- figures: written by python -m tests.reliability -->", "<!-- end of figures -->")
INSIDE = "VITRIM_RELIABILITY_INSIDE"
_ORDER = ("killed", "SIGTERM", "disk full", "read-only", "planted secrets", "fuzz")


def main() -> None:
    """Read the options, break commands, and write the page."""
    asked = argparse.ArgumentParser(prog="python -m tests.reliability", description=__doc__)
    asked.add_argument("--kills", type=int, default=50, help="SIGKILL at so many random moments of each command")
    asked.add_argument("--stops", type=int, default=50, help="SIGTERM likewise")
    asked.add_argument("--sizes", type=int, default=13, help="sizes of a disk that is too small")
    asked.add_argument("--moments", type=int, default=4, help="moments at which a disk becomes read-only")
    asked.add_argument("--fuzz", type=int, default=500, help="mutated files of each kind")
    asked.add_argument("--only", action="append", help="names of commands, or kinds of files; all by default")
    asked.add_argument("--out", type=Path, default=Path("docs/reliability.json"), help="record to write")
    given = asked.parse_args()
    if os.environ.get(INSIDE) is None:
        code = subprocess.run(
            ["unshare", "-rm", sys.executable, "-m", "tests.reliability", *sys.argv[1:]],
            env={**os.environ, INSIDE: "1", "OMP_NUM_THREADS": "1"},
            check=False,
        ).returncode
        sys.exit(code)
    found = _broken(given, lambda text: print(text, file=sys.stderr, flush=True))
    sys.exit(any(row["wrong"] for row in found["rows"]))


def _write(out: Path, found: dict[str, Any]) -> None:
    """Write the record and the page; rows of earlier calls stay where this one has not tried the same."""
    mine = {(row["what"], row["command"]) for row in found["rows"]}
    before = json.loads(out.read_text(encoding="utf-8"))["rows"] if out.is_file() else []
    kept = [row for row in before if (row["what"], row["command"]) not in mine]
    found = {**found, "rows": sorted(kept + found["rows"], key=lambda row: _ORDER.index(row["what"]))}
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    page = out.with_suffix(".md")
    page.write_text(_written(page.read_text(encoding="utf-8"), found), encoding="utf-8")


def _broken(given: Any, say: Callable[[str], None]) -> dict[str, Any]:
    """Break what is asked for, and write the record after each row, so that a stopped command keeps what it found."""
    import torch

    torch.set_num_threads(1)
    import timm

    import vitrim
    import vitrim.cli
    import vitrim.deploy.export
    import vitrim.methods.cait
    import vitrim.methods.spvit
    import vitrim.run.curve
    import vitrim.run.transfer.run  # what a child would import, each of them again
    from tests.fuzz.__main__ import counted
    from tests.fuzz.kinds import KINDS
    from tests.reliability import checks, commands
    from vitrim.methods.mdc import bayes

    bayes.PATIENCE = 2.0  # a shared search takes over the trial of a killed process after a minute
    rows: list[dict[str, Any]] = []
    found = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__,
                     "vitrim": vitrim.__version__},
        "rows": rows,
    }  # fmt: skip

    def row(what: str, command: str, counts: dict[str, Any]) -> None:
        by = shlex.join(["python", "-m", "tests.reliability", *sys.argv[1:]])
        rows.append({"what": what, "command": command, **counts, "by": by, "date": found["date"]})
        say(f"{what}, {command}: " + ", ".join(f"{k} {v}" for k, v in counts.items() if k != "wrong"))
        _write(given.out, found)

    chosen = given.only or list(commands.WRITING)
    if not given.only:
        row("planted secrets", "compress, push", _planted())
    for kind in KINDS if given.fuzz else ():
        if not given.only or kind in given.only:
            counts = counted([kind], 0, given.fuzz)[kind]
            row("fuzz", kind, {**counts, "times": counts.pop("cases")})
    with tempfile.TemporaryDirectory(prefix="vitrim-reliability-") as name:
        root = Path(name)
        commands.prepare(root)
        done = commands.run(commands.arguments_of("magnitude", root, root / "done"), root / "told")
        if done.status:
            sys.exit(f"a run must end well to be broken, but: {done.error}")
        for what, number, times in (("killed", signal.SIGKILL, given.kills), ("SIGTERM", signal.SIGTERM, given.stops)):
            for command in commands.COMMANDS:
                if times and command in chosen:
                    row(what, command, checks.stopped(command, root, root / "place", number, times, say))
        for command in chosen[::-1]:
            if given.moments:
                shares = [place / given.moments for place in range(given.moments)]
                row("read-only", command, checks.read_only(command, root, root / "place", shares, say))
            if given.sizes:
                shares = [(place + 0.5) / given.sizes for place in range(given.sizes)]
                row("disk full", command, checks.full_disk(command, root, root / "place", shares, say))
    return found


def _planted() -> dict[str, Any]:
    """Run the test of planted secrets."""
    test = "tests/test_secrets.py"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", test],
        capture_output=True,
        text=True,
        check=False,
    )
    from tests.test_secrets import PLANTED

    wrong = [] if done.returncode == 0 else [done.stdout[-1500:]]
    return {
        "what": "planted secrets",
        "command": "compress, push",
        "times": PLANTED,
        "found": len(wrong),
        "wrong": wrong,
    }


def _written(page: str, found: dict[str, Any]) -> str:
    """Return the page with its figures replaced."""
    before, _, rest = page.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    return before + MARKS[0] + "\n\n" + _table(found) + "\n\n" + MARKS[1] + after


def _table(found: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    calls = "; ".join(f"`{by}`" for by in dict.fromkeys(row["by"] for row in found["rows"]))
    lines = [f"{calls}; {found['date']}, {found['machine']}, {versions}; the record is `docs/reliability.json`.", "",
             "| what | command or kind | times | as it must be | done before | wrong |",
             "| --- | --- | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for row in found["rows"]:
        early = row.get("early", row.get("fitted", 0))
        good = row["times"] - early - len(row["wrong"])
        cells = (row["what"], row["command"], row["times"], good, early or "", len(row["wrong"]))
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
