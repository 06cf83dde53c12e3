"""Measure how much memory a runtime takes to open and run a model, each in its own process.

In one process, the second model would reuse the memory that the first has freed, and seem to need none.
"""

import json
import subprocess
import sys
from pathlib import Path

from vitrim.words.errors import ExportError

__all__ = ["peak_bytes"]

_STATUS = Path("/proc/self/status")


def peak_bytes(file: Path, image: tuple[int, int, int], runtime: str, batch: int, threads: int) -> int | None:
    """Return the peak memory that opening `file` and two passes add to a process that has its libraries loaded.

    Args:
        file: for ``eager`` a model that vitrim stored, for ``onnxruntime`` and ``openvino`` an ONNX file.
        image: channels, height and width.
        runtime: the runtime. ``compile`` gives None, because the compiler runs in the same process.
        batch: images of a pass, at least 1.
        threads: CPU threads.

    Returns:
        Bytes of resident memory; None if the system (any but Linux) or the runtime does not allow the measurement.

    Raises:
        ExportError: if the process fails, with its last line of output.
    """
    if runtime == "compile" or not _STATUS.is_file():
        return None
    asked = json.dumps({"file": str(file), "image": image, "runtime": runtime, "batch": batch, "threads": threads})
    done = subprocess.run([sys.executable, "-m", "vitrim.deploy.runtimes.peak", asked], capture_output=True, text=True)
    if done.returncode:
        words = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ExportError(f"{file}: {runtime} must be able to run it in a process of its own, but says: {words[:200]}")
    return int(done.stdout.split()[-1])


def _resident(name: str) -> int:
    """Return a line of the process's status, in bytes."""
    line = next(line for line in _STATUS.read_text(encoding="utf-8").splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def _grow(file: str, image: tuple[int, int, int], runtime: str, batch: int, threads: int) -> int:
    import torch

    from vitrim.deploy import store
    from vitrim.deploy.runtimes.ready import _eager, _of_file

    torch.set_num_threads(threads)
    images = torch.zeros(batch, *image)
    if runtime != "eager":
        __import__(runtime)
    before = _resident("VmRSS")
    run = _eager(store.load(file)) if runtime == "eager" else _of_file(Path(file), runtime, threads).run
    for _ in range(2):
        run(images)
    return max(_resident("VmHWM") - before, 0)


if __name__ == "__main__":
    sys.stdout.write(f"{_grow(**json.loads(sys.argv[1]))}\n")
