"""Random numbers as a function of a key, so that a resumed run draws the same ones as an uninterrupted run."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch

__all__ = ["Drawn", "numbers", "reading", "seeded"]


def numbers(*key: int) -> np.random.Generator:
    """Return a new generator seeded with this key (non-negative integers)."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


@contextlib.contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seed the global CPU generators of Python, NumPy and torch from the key, and restore their states at the end.

    torch's generators on accelerators are not changed; `torch.manual_seed` would reseed those as well.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    one, two, three = (int(word) for word in np.random.SeedSequence(key).generate_state(3))
    random.seed(one)
    np.random.seed(two)
    torch.default_generator.manual_seed(three)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def reading(dataset: object, *key: int) -> contextlib.AbstractContextManager[None]:
    """Seed the global generators while a picture is read, unless the dataset is `fixed` and draws no random numbers.

    Restoring the states of the generators takes 0.1 ms per picture, more than reading an image of 32 x 32 pixels.
    """
    return contextlib.nullcontext() if getattr(dataset, "fixed", False) is True else seeded(*key)


class Drawn:
    """True if a global CPU generator of Python, NumPy or torch has been used since this object was created."""

    def __init__(self) -> None:
        self._states = self._now()

    @staticmethod
    def _now() -> tuple[object, bytes, int, bytes]:
        _, words, place, *_ = np.random.get_state()
        return random.getstate(), np.asarray(words).tobytes(), int(place), torch.get_rng_state().numpy().tobytes()

    def __bool__(self) -> bool:
        return self._states != self._now()
