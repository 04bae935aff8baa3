"""The same random numbers for all candidates, though they are evaluated one after another."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def same_numbers(like: Tensor) -> Iterator[Callable[[], None]]:
    """A function that sets torch's random numbers back to where they were, on the CPU and the device of `like`."""
    cuda = torch.cuda.get_rng_state(like.device) if like.device.type == "cuda" else None
    cpu = torch.get_rng_state()

    def again() -> None:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, like.device)

    yield again
