"""Handwritten digits, 8x8, from scikit-learn."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from steepest.data.batches import Epochs, InOrder


@dataclass(frozen=True)
class Digits:
    """Standardised images and their labels 0 to 9, divided into training and test.

    Attributes:
        train_x: (n, 1, 8, 8) or (n, 64) float32, of mean 0 and variance 1 over all training pixels.
        train_y: (n,) int64.
        test_x: The same for the test images, with the training images' mean and variance.
        test_y: (m,) int64.
    """

    train_x: Float[Tensor, "train *shape"]
    train_y: Int[Tensor, "train"]
    test_x: Float[Tensor, "test *shape"]
    test_y: Int[Tensor, "test"]

    def __repr__(self) -> str:
        return f"Digits(train={len(self.train_y)}, test={len(self.test_y)}, shape={tuple(self.train_x.shape[1:])})"

    def batches(
        self,
        split: str,
        batch_size: int,
        generator: torch.Generator | None = None,
        *,
        device: torch.device | str = "cpu",
    ) -> Epochs | InOrder:
        """Batches `(x, y)`.

        Args:
            split: "train": endless shuffled epochs (`Epochs`); "test" or "val": all test images in order (`InOrder`).
            batch_size: Images per batch.
            generator: Source of the order, needed for "train"; unused otherwise.
            device: Where the batches go.

        Raises:
            ValueError: the split is unknown, the batch size is out of range, or there is no generator for "train".
        """
        if split in ("test", "val"):
            return InOrder(self.test_x, self.test_y, batch_size, device)
        if split != "train":
            raise ValueError(f"split must be 'train' or 'test', got {split!r}")
        if generator is None:
            raise ValueError("generator must be a torch.Generator for split 'train', got None")
        return Epochs(self.train_x, self.train_y, batch_size, generator, device)


def digits(*, flat: bool = False, test_fraction: float = 0.2) -> Digits:
    """The 1797 digits of scikit-learn, always divided in the same way, each class with its share on both sides.

    Args:
        flat: Whether images are (64,) instead of (1, 8, 8).
        test_fraction: Share of test images.

    Raises:
        ValueError: `test_fraction` is out of range.
    """
    if not 0.01 <= test_fraction <= 0.99:
        raise ValueError(f"test_fraction must be between 0.01 and 0.99, got {test_fraction}")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data, labels = load_digits(return_X_y=True)
    train, test = train_test_split(np.arange(len(labels)), test_size=test_fraction, random_state=0, stratify=labels)
    data = (data - data[train].mean()) / data[train].std()
    x = torch.from_numpy(data.astype(np.float32))
    x = x if flat else x.view(-1, 1, 8, 8)
    y = torch.from_numpy(labels.astype(np.int64))
    return Digits(x[train], y[train], x[test], y[test])
