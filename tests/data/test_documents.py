import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steepest._errors import UserError
from steepest.data.documents import Document, capped, divide, embedded, fingerprint, from_path, name_hash


@pytest.fixture(scope="module")
def corpus():
    return embedded()


def test_embedded_is_real_text_in_a_fixed_order(corpus):
    names = [document.name for document in corpus]
    assert names == sorted(set(names))
    assert {"library/json/decoder.py", "library/argparse.py", "reference/assignment"} <= set(names)
    assert sum(len(document.text) for document in corpus) > 3_000_000
    assert all(document.text.strip() and "\0" not in document.text for document in corpus)
    assert embedded() == corpus


def test_embedded_leaves_out_tests_tables_and_other_packages(corpus):
    parts = {part for document in corpus for part in document.name.split("/")}
    assert parts.isdisjoint({"test", "tests", "site-packages", "idlelib", "lib2to3", "encodings", "torch"})
    assert not any(part.startswith("_sysconfigdata") for part in parts)


def test_a_python_without_sources_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match=r"^path must be given"):
        embedded()


some_documents = st.lists(
    st.tuples(st.text(min_size=1, max_size=8), st.text(min_size=1, max_size=60)),
    min_size=1,
    max_size=12,
    unique_by=lambda pair: pair[0],
).map(lambda pairs: [Document(*pair) for pair in pairs])


@settings(max_examples=80, deadline=None)
@given(documents=some_documents, fraction=st.floats(0.05, 0.95))
def test_division_loses_nothing_and_shares_nothing(documents, fraction):
    train, val = divide(documents, fraction)
    assert train
    assert val
    if len(documents) == 1:
        assert train[0].text + val[0].text == documents[0].text
        assert train[0].name != val[0].name
    else:
        assert {d.name for d in train}.isdisjoint(d.name for d in val)
        assert sorted(train + val, key=lambda d: d.name) == sorted(documents, key=lambda d: d.name)
    assert divide(documents[::-1], fraction) == (train, val)


def test_division_follows_the_name_alone(corpus):
    train, val = divide(corpus, 0.1)
    assert all(name_hash(document.name) < 0.1 for document in val)
    assert all(name_hash(document.name) >= 0.1 for document in train)
    half = divide(corpus[::2], 0.1)[1]
    assert {document.name for document in half} <= {document.name for document in val}


def test_a_single_document_is_cut_at_a_line():
    text = "".join(f"line {i}\n" for i in range(100))
    (train,), (val,) = divide([Document("a", text)], 0.2)
    assert train.text.endswith("\n")
    assert len(val.text) == pytest.approx(0.2 * len(text), abs=10)


def test_name_hash_is_fixed():
    assert name_hash("a") == int(hashlib.sha256(b"a").hexdigest()[:12], 16) / 2**48
    assert 0 <= name_hash("") < 1


@settings(max_examples=50, deadline=None)
@given(documents=some_documents, limit=st.integers(1, 300))
def test_cap(documents, limit):
    chosen = capped(documents, limit)
    assert chosen
    assert sum(len(document.text.encode()) for document in chosen) <= limit
    if limit >= sum(len(document.text.encode()) for document in documents):
        assert chosen == sorted(documents, key=lambda d: d.name)


def test_fingerprint_depends_on_names_texts_and_borders():
    a, b = Document("a", "xy"), Document("b", "z")
    prints = {
        fingerprint(documents)
        for documents in ([a, b], [b, a], [a], [Document("a", "x"), Document("b", "yz")], [Document("ax", "y"), b])
    }
    assert len(prints) == 5
    assert fingerprint([a, b]) == fingerprint([Document("a", "xy"), Document("b", "z")])


def test_folder(tmp_path):
    (tmp_path / "b.txt").write_text("bee\r\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.md").write_text("\ufeffé", encoding="utf-8")
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.txt").write_text("no")
    (tmp_path / "empty.txt").write_text(" \n")
    assert from_path(tmp_path) == [Document("b.txt", "bee\n"), Document("sub/a.md", "é")]
    assert from_path(tmp_path, [".md"]) == [Document("sub/a.md", "é")]
    assert from_path(str(tmp_path / "b.txt")) == [Document("b.txt", "bee\n")]
    (tmp_path / "image.png").write_bytes(b"\x89PNG\x00\xff")
    with pytest.raises(UserError, match=r"image\.png is binary.*suffixes"):
        from_path(tmp_path)


@pytest.mark.parametrize(
    ("content", "match"),
    [(b"", "empty"), (b"\n \n", "empty"), (b"a\0b", "binary"), ("é".encode("latin-1"), "UTF-8")],
)
def test_a_file_that_is_no_text(tmp_path, content, match):
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(UserError, match=rf"^path must.*{match}"):
        from_path(tmp_path / "f")


def test_missing_and_empty_paths(tmp_path):
    with pytest.raises(UserError, match=r"there is no .*nowhere"):
        from_path(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is empty"):
        from_path(tmp_path)


def test_unreadable_file(tmp_path, monkeypatch):
    (tmp_path / "f").write_text("x")

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    with pytest.raises(UserError, match=r"^path must be readable.*Permission denied"):
        from_path(tmp_path / "f")
