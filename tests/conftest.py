import os
import signal
import sys

# A shell that starts the tests in the background lets them ignore ctrl-C, and what they start too.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Two spinning threads on a busy machine of two cores are up to 60 times slower than one, on models as small as these.
os.environ["OMP_NUM_THREADS"] = "1"

HANGS = 1800
"""Seconds after which a test that starts a process gives up on it: far beyond what a busy machine needs."""

import pytest  # noqa: E402
import torch  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402

if not torch.cuda.is_available():
    # Read where a kernel is defined: without a GPU, Triton's interpreter runs them.
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    if not os.environ.get("VITRIM_WHOLE"):
        long = [item for item in items if item.get_closest_marker("whole")]
        items[:] = [item for item in items if not item.get_closest_marker("whole")]
        config.hook.pytest_deselected(items=long)


@pytest.fixture(autouse=True)
def _on_the_cpu(request, monkeypatch):
    """Tests without the mark `gpu` are about results in float32 to the last bits: they run on the CPU everywhere."""
    if not torch.cuda.is_available():
        yield
        return
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)  # it remembers the device of the first test
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _shared_models_stay_as_they_are():
    """Make a shared model anew if a test cast it, because others would fail that come after it in the same process."""
    yield
    samples = sys.modules.get("tests.samples")
    for place, model in list(samples.SHARED.items()) if samples is not None else ():
        if next(model.parameters()).dtype != torch.float64:
            del samples.SHARED[place]
