"""List a folder of many empty image files: seconds and memory, beside timm's reader, extrapolated to ImageNet.

    python benchmarks/listing.py --files 100000

Each is measured in a process of its own, as the growth of its peak memory over what its imports take. The files are
made in a temporary folder, 1,300 a class, and removed at the end.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

IMAGENET = 1_281_167
PER_CLASS = 1300

MEASURE = """
import json, sys, time
from pathlib import Path
{load}
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
before, start, cpu = peak(), time.perf_counter(), time.process_time()
count = {count}
cpu = time.process_time() - cpu
print(json.dumps({{"seconds": time.perf_counter() - start, "cpu": cpu, "MB": peak() - before, "files": count}}))
"""
OURS = ("from vitrim.data import split", "(lambda parts: len(parts.train))(split(sys.argv[1], seed=0, validation=0))")
TIMM = (
    "from timm.data import create_dataset",
    "len(create_dataset('', root=sys.argv[1], search_split=False))",
)


def measure(load: str, count: str, root: Path) -> dict[str, float]:
    """Run one listing in a process of its own."""
    code = MEASURE.format(load=load, count=count)
    done = subprocess.run([sys.executable, "-c", code, str(root)], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Make the files, list them with both, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--skip-timm", action="store_true", help="measure ours alone")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for first in range(0, arguments.files, PER_CLASS):
            inside = root / f"n{first // PER_CLASS:08d}"
            inside.mkdir()
            for number in range(first, min(first + PER_CLASS, arguments.files)):
                (inside / f"{inside.name}_{7 * (number - first)}.JPEG").touch()
        print(f"| {arguments.files:,} files | seconds | of a CPU | MB | CPU seconds for ImageNet | MB for ImageNet |")
        print("| --- | ---: | ---: | ---: | ---: | ---: |")
        rows = {"vitrim, with splits": OURS} | ({} if arguments.skip_timm else {"timm, listing alone": TIMM})
        for name, (load, count) in rows.items():
            found = measure(load, count, root)
            assert found["files"] == arguments.files
            times = IMAGENET / arguments.files
            wall, cpu, size = found["seconds"], found["cpu"], found["MB"]
            print(f"| {name} | {wall:.1f} | {cpu:.1f} | {size:.0f} | {cpu * times:.0f} | {size * times:.0f} |")


if __name__ == "__main__":
    main()
