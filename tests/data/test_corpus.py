import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steepest import data
from steepest.data import tokenizers
from steepest.data.documents import embedded

CAP = 300_000


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def bpe(cache):
    return data.text("bpe", vocab_size=300, max_bytes=CAP, cache=cache)


@pytest.fixture(scope="module")
def byte():
    return data.text(max_bytes=CAP)


def test_bytes_hold_the_documents(byte):
    assert byte.vocab_size == 256
    assert byte.train_bytes + byte.val_bytes <= CAP + len(byte.train_documents) + len(byte.val_documents)
    assert len(byte.val) == byte.val_bytes
    texts = {document.name: document.text for document in embedded()}
    assert byte.decode(byte.train).split("\0") == [texts[name] for name in byte.train_documents]
    assert byte.decode(byte.val).split("\0") == [texts[name] for name in byte.val_documents]
    assert set(byte.train_documents).isdisjoint(byte.val_documents)


def test_bpe_holds_the_same_text_in_fewer_tokens(byte, bpe):
    assert bpe.vocab_size == 300
    assert bpe.sha256 == byte.sha256
    assert bpe.decode(bpe.train) == byte.decode(byte.train)
    assert bpe.decode(bpe.val) == byte.decode(byte.val)
    assert len(bpe.train) < len(byte.train)
    assert 0 <= int(bpe.train.min()) <= int(bpe.train.max()) < 300


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_round_trip(byte, bpe, text):
    for corpus in (byte, bpe):
        ids = corpus.encode(text)
        assert ids.dtype == torch.int64
        assert corpus.decode(ids) == text
        assert corpus.decode(ids.tolist()) == text


def test_no_training_text_comes_from_the_validation_documents(tmp_path, monkeypatch):
    seen = []
    original = tokenizers.train_bpe
    monkeypatch.setattr(tokenizers, "train_bpe", lambda texts, *rest: seen.extend(texts) or original(texts, *rest))
    corpus = data.text("bpe", vocab_size=280, max_bytes=50_000, cache=tmp_path)
    assert "\0".join(seen) == corpus.decode(corpus.train)


def test_the_cache_gives_the_same_and_nothing_is_built_again(bpe, cache, monkeypatch):
    monkeypatch.setattr(tokenizers, "train_bpe", lambda *args: pytest.fail("trained again"))
    again = data.text("bpe", vocab_size=300, max_bytes=CAP, cache=cache)
    assert torch.equal(again.train, bpe.train)
    assert torch.equal(again.val, bpe.val)
    assert again.encode("def f(x):").tolist() == bpe.encode("def f(x):").tolist()
    assert not list(cache.glob("*.part"))


@pytest.mark.parametrize("which", ["*.json", "*.train.npy", "*.val.npy"])
@pytest.mark.parametrize("damage", ["cut", "garbage", "flip", "missing"])
def test_a_damaged_cache_is_built_again(tmp_path, which, damage):
    first = data.text("bpe", vocab_size=270, max_bytes=30_000, cache=tmp_path)
    (file,) = tmp_path.glob(which)
    whole = file.read_bytes()
    if damage == "cut":
        file.write_bytes(whole[: len(whole) // 2])
    elif damage == "garbage":
        file.write_bytes(b"\xff\xfe not this")
    elif damage == "flip":
        file.write_bytes(whole[:-40] + bytes([whole[-40] ^ 1]) + whole[-39:])
    else:
        file.unlink()
    again = data.text("bpe", vocab_size=270, max_bytes=30_000, cache=tmp_path)
    assert torch.equal(first.train, again.train)
    assert file.read_bytes() == whole


def test_a_cache_that_cannot_be_written_only_warns(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="could not be kept"):
        corpus = data.text("bpe", vocab_size=270, max_bytes=30_000, cache=tmp_path / "file")
    assert corpus.vocab_size == 270


def test_another_process_makes_the_same_bytes(bpe, cache, tmp_path):
    code = (
        "import sys; from steepest import data; data.text('bpe', vocab_size=300, max_bytes=300_000, cache=sys.argv[1])"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment)
    mine = {file.name: file.read_bytes() for file in cache.iterdir()}
    theirs = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert mine == theirs
    assert len(mine) == 3


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tokenizers.cache_folder() == tmp_path / "steepest"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tokenizers.cache_folder() == tmp_path / ".cache" / "steepest"


def test_ones_own_text(tmp_path):
    file = tmp_path / "tale.txt"
    file.write_text("".join(f"Once upon a time {i}.\n" for i in range(200)))
    corpus = data.text(path=file)
    assert corpus.name == "tale.txt"
    assert corpus.decode(corpus.train) + corpus.decode(corpus.val) == file.read_text()
    assert data.text("bpe", vocab_size=280, path=tmp_path, cache=tmp_path / ".cache").vocab_size == 280
    with pytest.raises(ValueError, match=r"^vocab_size must be at most"):
        data.text("bpe", vocab_size=5000, path=file, cache=tmp_path / ".cache")
    assert "tale.txt" in repr(corpus)


def test_a_vocabulary_beyond_16_bits_survives_the_cache(tmp_path):
    tokens = np.arange(70_000, dtype=np.int32)
    model = tokenizers.train_bpe(["abc"], 257, 10)
    model.vocab_size = 70_000
    tokenizers._save(tmp_path / "m.json", model, {"train": tokens, "val": tokens[:3]})
    loaded = tokenizers._load(tmp_path / "m.json")
    assert loaded is not None
    assert np.array_equal(loaded[1], tokens)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tokenizer": "word"}, "^tokenizer must be one of byte, bpe"),
        ({"vocab_size": 300}, "^vocab_size must be 256"),
        ({"tokenizer": "bpe", "vocab_size": 256, "max_bytes": 1000}, "^vocab_size must be at least 257"),
        ({"vocab_size": 0}, "^vocab_size must"),
        ({"val_fraction": 0.0}, "^val_fraction must"),
        ({"val_fraction": 1.0}, "^val_fraction must"),
        ({"max_bytes": 0}, "^max_bytes must"),
        ({"path": "/nowhere/at/all"}, "^path must"),
    ],
)
def test_wrong_use(options, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        data.text(**options, cache=tmp_path)
    assert not list(tmp_path.iterdir())


def test_wrong_batches(byte):
    generator = torch.Generator()
    with pytest.raises(ValueError, match=r"^split must"):
        byte.batches("test", 2, 8)
    with pytest.raises(ValueError, match=r"^generator must"):
        byte.batches("train", 2, 8)
    with pytest.raises(ValueError, match=r"^max_batches"):
        byte.batches("train", 2, 8, generator, max_batches=2)
    with pytest.raises(ValueError, match=r"^context must be below"):
        byte.batches("val", 2, 10**7)
    with pytest.raises(ValueError, match=r"^batch_size must"):
        byte.batches("train", 0, 8, generator)
    with pytest.raises(TypeError, match=r"^context must"):
        byte.batches("train", 2, 8.0, generator)
