"""A text corpus: documents, divided into training and validation, as token ids."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from steepest._checks import check_int
from steepest.data import documents as docs
from steepest.data.batches import RandomWindows, Windows
from steepest.data.tokenizers import BPE, SEPARATOR, Bytes, bpe_tokens, cache_folder

TOKENIZERS = ("byte", "bpe")


@dataclass(frozen=True)
class TextCorpus:
    """Token ids of a text, divided by document.

    Attributes:
        name: What the text is.
        train: Ids of the training documents, with id 0 (NUL) between documents.
        val: Ids of the validation documents.
        vocab_size: Number of ids.
        train_bytes: Size of the training text in UTF-8, separators included.
        val_bytes: The same for validation; `val_bytes / len(val)` turns nats per token into nats per byte.
        sha256: Fingerprint of all documents' names and texts.
        train_documents: Names of the training documents, in order.
        val_documents: Names of the validation documents, in order.
    """

    name: str
    train: Int[Tensor, "train_length"]
    val: Int[Tensor, "val_length"]
    vocab_size: int
    train_bytes: int
    val_bytes: int
    sha256: str
    train_documents: tuple[str, ...] = field(repr=False)
    val_documents: tuple[str, ...] = field(repr=False)
    _tokenizer: Bytes | BPE = field(repr=False)

    def __repr__(self) -> str:
        return (
            f"TextCorpus({self.name!r}, train={len(self.train)} tokens of {len(self.train_documents)} documents, "
            f"val={len(self.val)} of {len(self.val_documents)}, vocab_size={self.vocab_size}, "
            f"sha256={self.sha256[:12]})"
        )

    def encode(self, text: str) -> Int[Tensor, "length"]:
        """The ids of `text`, int64."""
        return torch.from_numpy(self._tokenizer.encode(text).astype(np.int64))

    def decode(self, ids: Int[Tensor, "length"] | Sequence[int]) -> str:
        """The text of `ids`."""
        return self._tokenizer.decode(ids.tolist() if isinstance(ids, Tensor) else list(ids))

    def batches(
        self,
        split: str,
        batch_size: int,
        context: int,
        generator: torch.Generator | None = None,
        *,
        max_batches: int | None = None,
        device: torch.device | str = "cpu",
    ) -> RandomWindows | Windows:
        """Batches `(x, y)` of int64 ids, each (batch, context), with `y` one position ahead of `x`.

        Args:
            split: "train": endless random windows (`RandomWindows`); "val": all windows in order (`Windows`).
            batch_size: Windows per batch.
            context: Length of a window.
            generator: Source of the training windows, needed there; unused for "val".
            max_batches: For "val": only so many batches, of windows spread evenly over the split.
            device: Where the batches go.

        Raises:
            ValueError: the split is unknown, a size is below 1, the split is shorter than a window, or there is no
                generator for "train".
        """
        if split == "val":
            return Windows(self.val, batch_size, context, max_batches, device)
        if split != "train":
            raise ValueError(f"split must be 'train' or 'val', got {split!r}")
        if max_batches is not None:
            raise ValueError("max_batches is for split 'val'; training batches are endless")
        if generator is None:
            raise ValueError("generator must be a torch.Generator for split 'train', got None")
        return RandomWindows(self.train, batch_size, context, generator, device)


def text(
    tokenizer: str = "byte",
    *,
    vocab_size: int | None = None,
    path: str | Path | None = None,
    suffixes: Sequence[str] | None = None,
    val_fraction: float = 0.1,
    max_bytes: int | None = None,
    bpe_bytes: int = 2_000_000,
    cache: str | Path | None = None,
) -> TextCorpus:
    """A corpus of real text: by default what ships inside Python (its language reference and its library's sources).

    Args:
        tokenizer: "byte" (256 ids) or "bpe" (byte-pair encoding trained on the training documents; needs `tokenizers`).
        vocab_size: Ids of "bpe", at least 257; 1024 if None.
        path: A text file or a folder of text files to use instead.
        suffixes: Endings of the files of the folder to take; all if None.
        val_fraction: Chance that a document is for validation. A single document gives its last part.
        max_bytes: Take only a fixed, mixed subset of at most this size; all if None.
        bpe_bytes: How much training text "bpe" learns from.
        cache: Folder that keeps the tokens of "bpe"; `$XDG_CACHE_HOME/steepest` or `~/.cache/steepest` if None.

    Raises:
        ValueError: an argument is out of range.
        UserError: `path` does not exist, or its text is empty, binary or not UTF-8 (a ValueError, too).

    Examples:
        >>> corpus = text(max_bytes=500_000)
        >>> x, y = next(corpus.batches("train", 8, 64, torch.Generator().manual_seed(0)))
    """
    if tokenizer not in TOKENIZERS:
        raise ValueError(f"tokenizer must be one of {', '.join(TOKENIZERS)}, got {tokenizer!r}")
    if vocab_size is not None:
        check_int("vocab_size", vocab_size)
        if tokenizer == "byte" and vocab_size != Bytes.vocab_size:
            raise ValueError(f"vocab_size must be {Bytes.vocab_size} for 'byte', got {vocab_size}")
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction must be between 0 and 1, got {val_fraction}")
    check_int("bpe_bytes", bpe_bytes)
    documents = docs.embedded() if path is None else docs.from_path(path, suffixes)
    if max_bytes is not None:
        check_int("max_bytes", max_bytes)
        documents = docs.capped(documents, max_bytes)
    train, val = docs.divide(documents, val_fraction)
    texts = [[document.text for document in side] for side in (train, val)]
    if tokenizer == "byte":
        used: Bytes | BPE = Bytes()
        arrays = [used.encode(SEPARATOR.join(side)) for side in texts]
    else:
        folder = cache_folder() if cache is None else Path(cache)
        used, *arrays = bpe_tokens(texts[0], texts[1], vocab_size or 1024, bpe_bytes, folder)
    return TextCorpus(
        name="Python's language reference and standard library" if path is None else Path(path).name,
        train=torch.from_numpy(arrays[0].astype(np.int32)),
        val=torch.from_numpy(arrays[1].astype(np.int32)),
        vocab_size=used.vocab_size,
        train_bytes=_size(texts[0]),
        val_bytes=_size(texts[1]),
        sha256=docs.fingerprint(documents),
        train_documents=tuple(document.name for document in train),
        val_documents=tuple(document.name for document in val),
        _tokenizer=used,
    )


def _size(texts: Sequence[str]) -> int:
    return len(SEPARATOR.join(texts).encode())
