"""Random streams that touch no global state: the data's draws and the model's never mix, and both can be saved."""

import random
from typing import Any

import torch


class RandomStream:
    """A private state of the global random generators (torch, Python, NumPy); a context manager.

    Inside `with stream:` the global generators continue this stream; outside, they are as they were. So user code that
    draws from them (dropout, a shuffling DataLoader) is reproducible, and two streams do not disturb each other.

    Args:
        seed: Start of the stream.
        device: Whose generator belongs to the stream, besides the CPU's.
    """

    def __init__(self, seed: int, device: torch.device | None = None):
        self.device = device if device is not None and device.type == "cuda" else None
        outer = self._get()
        random.seed(seed)
        _numpy().seed(seed % 2**32)
        torch.manual_seed(seed)
        self._state = self._get()
        self._set(outer)
        self._outer: list[tuple[Any, ...]] = []

    def __enter__(self) -> "RandomStream":
        self._outer.append(self._get())
        self._set(self._state)
        return self

    def __exit__(self, *_: object) -> None:
        self._state = self._get()
        self._set(self._outer.pop())

    def state_dict(self) -> dict[str, Any]:
        """The state, as tensors and plain data."""
        cpu, cuda, python, numpy = self._state
        version, words, gauss = python
        kind, keys, position, has_gauss, cached = numpy
        return {
            "torch": cpu,
            "cuda": cuda,
            "python": [version, torch.tensor(words, dtype=torch.int64), gauss],
            "numpy": [kind, torch.from_numpy(keys.astype("int64")), int(position), int(has_gauss), float(cached)],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        version, words, gauss = state["python"]
        kind, keys, position, has_gauss, cached = state["numpy"]
        self._state = (
            state["torch"],
            state["cuda"],
            (version, tuple(words.tolist()), gauss),
            (kind, keys.numpy().astype("uint32"), position, has_gauss, cached),
        )

    def _get(self) -> tuple[Any, ...]:
        cuda = None if self.device is None else torch.cuda.get_rng_state(self.device)
        return torch.get_rng_state(), cuda, random.getstate(), _numpy().get_state()

    def _set(self, state: tuple[Any, ...]) -> None:
        cpu, cuda, python, numpy = state
        torch.set_rng_state(cpu)
        if self.device is not None and cuda is not None:
            torch.cuda.set_rng_state(cuda, self.device)
        random.setstate(python)
        _numpy().set_state(numpy)


def _numpy() -> Any:
    import numpy as np

    return np.random
