"""Tokenizers: bytes, and byte-pair encoding trained on the corpus itself. Id 0 is NUL, which separates documents."""

import hashlib
import io
import json
import os
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from steepest._files import write_atomic

SEPARATOR = "\0"
_FORMAT = 1
_SMALLEST_VOCABULARY = 257  # the separator and all bytes


class Bytes:
    """The 256 UTF-8 byte values. Bytes that are no valid UTF-8 decode to the replacement character."""

    vocab_size = 256

    def encode(self, text: str) -> np.ndarray:
        """The bytes of `text`."""
        return np.frombuffer(text.encode(), dtype=np.uint8)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the bytes `ids`."""
        return bytes(ids).decode(errors="replace")


class BPE:
    """Byte-level byte-pair encoding, on a `tokenizers.Tokenizer`."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.vocab_size: int = tokenizer.get_vocab_size()

    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`."""
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def encode_documents(self, texts: Sequence[str]) -> np.ndarray:
        """The ids of all documents, one after the other, with the separator between them."""
        pieces: list[list[int]] = []
        for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False):
            pieces += [encoding.ids, [0]]
        return np.concatenate([np.array(piece, dtype=np.int32) for piece in pieces[:-1]])


def train_bpe(texts: Sequence[str], vocab_size: int, max_bytes: int) -> BPE:
    """Train on the beginnings of all documents, an equal share of `max_bytes` each. Deterministic."""
    from tokenizers import Tokenizer as Model
    from tokenizers import decoders, models, pre_tokenizers, trainers

    model = Model(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    model.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    share = max(max_bytes // len(texts), 1)
    model.train_from_iterator([text[:share] for text in texts], trainer=trainer, length=len(texts))
    found = model.get_vocab_size()
    if found != vocab_size:
        raise ValueError(f"vocab_size must be at most {found}, all that this text yields, got {vocab_size}")
    return BPE(model)


def bpe_tokens(
    train: Sequence[str], val: Sequence[str], vocab_size: int, max_bytes: int, cache: Path | None
) -> tuple[BPE, np.ndarray, np.ndarray]:
    """A tokenizer trained on the documents `train`, and the tokens of both splits; from the cache where it has them.

    The cache holds, per corpus and vocabulary, the two arrays as .npy and a .json with the tokenizer and the arrays'
    checksums, which is written last. What does not fit its checksum is built again.
    """
    if vocab_size < _SMALLEST_VOCABULARY:
        raise ValueError(f"vocab_size must be at least {_SMALLEST_VOCABULARY} for 'bpe', got {vocab_size}")
    manifest = None if cache is None else cache / f"bpe-{vocab_size}-{_key(train, val, vocab_size, max_bytes)}.json"
    if manifest is not None and (cached := _load(manifest)) is not None:
        return cached
    tokenizer = train_bpe(train, vocab_size, max_bytes)
    arrays = {name: tokenizer.encode_documents(texts) for name, texts in (("train", train), ("val", val))}
    if manifest is not None:
        try:
            _save(manifest, tokenizer, arrays)
        except OSError as error:
            warnings.warn(f"the tokenized text could not be kept in {manifest.parent}: {error}", stacklevel=4)
    return tokenizer, arrays["train"], arrays["val"]


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/steepest`, by default `~/.cache/steepest`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "steepest"


def _key(train: Sequence[str], val: Sequence[str], vocab_size: int, max_bytes: int) -> str:
    digest = hashlib.sha256(f"{_FORMAT} {version('tokenizers')} {vocab_size} {max_bytes}".encode())
    for texts in (train, val):
        for text in texts:
            data = text.encode()
            digest.update(len(data).to_bytes(8, "big"))
            digest.update(data)
        digest.update(b"|")
    return digest.hexdigest()[:24]


def _save(manifest: Path, tokenizer: BPE, arrays: dict[str, np.ndarray]) -> None:
    sums = {}
    for name, array in arrays.items():
        buffer = io.BytesIO()
        np.save(buffer, array.astype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32))
        write_atomic(manifest.with_suffix(f".{name}.npy"), buffer.getvalue())
        sums[name] = hashlib.sha256(buffer.getvalue()).hexdigest()
    content = {"format": _FORMAT, "sha256": sums, "tokenizer": tokenizer._tokenizer.to_str()}
    write_atomic(manifest, json.dumps(content))


def _load(manifest: Path) -> tuple[BPE, np.ndarray, np.ndarray] | None:
    """What `_save` wrote, or None if it is missing or damaged."""
    from tokenizers import Tokenizer as Model

    try:
        content = json.loads(manifest.read_bytes())
        arrays = []
        for name in ("train", "val"):
            data = manifest.with_suffix(f".{name}.npy").read_bytes()
            if hashlib.sha256(data).hexdigest() != content["sha256"][name]:
                return None
            arrays.append(np.load(io.BytesIO(data), allow_pickle=False).astype(np.int32))
        tokenizer = BPE(Model.from_str(content["tokenizer"]))
    except Exception:  # `tokenizers` raises bare exceptions; whatever is wrong, the cure is to build it again
        return None
    return tokenizer, arrays[0], arrays[1]
