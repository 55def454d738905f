"""Documents and rows: what is in them, and that a cursor leads back to the same place."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from saes.store import DocumentRows, EveryNth, ListedDocuments, MixedRows, StreamedDocuments, read_text_file, take

DOCS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [12, 13]]


def listed(shuffle: bool = False, seed: int = 0) -> ListedDocuments:
    return ListedDocuments(DOCS, shuffle=shuffle, seed=seed)


def all_rows(source, at_most: int = 100) -> list[list[int]]:
    rows = take(source, at_most)
    assert rows is not None
    return [tokens[real].tolist() for tokens, real in zip(rows.tokens, rows.real, strict=True)]


def test_packed_rows_hold_every_token_once() -> None:
    rows = all_rows(DocumentRows(listed(), 4, separator=0, epochs=1))
    assert rows == [[0, 1, 2, 3], [0, 4, 0, 5], [6, 7, 8, 9], [10, 11, 0, 12], [13]]


def test_one_document_a_row() -> None:
    source = DocumentRows(listed(), 4, pack=False, epochs=1)
    rows = take(source, 9)
    assert rows is not None
    assert rows.tokens.tolist() == [[1, 2, 3, 0], [4, 0, 0, 0], [5, 6, 7, 8], [12, 13, 0, 0]]
    assert rows.real.sum(1).tolist() == [3, 1, 4, 2]
    assert take(source, 1) is None


def test_every_pass_has_an_order_of_its_own() -> None:
    source = DocumentRows(listed(shuffle=True), 13, epochs=3)
    rows = all_rows(source)
    assert [sorted(row) for row in rows] == [list(range(1, 14))] * 3
    assert len({tuple(row) for row in rows}) > 1
    assert rows == all_rows(DocumentRows(listed(shuffle=True), 13, epochs=3))
    assert rows != all_rows(DocumentRows(listed(shuffle=True, seed=1), 13, epochs=3))


class CanSkip(list):
    """What a `datasets` data set offers."""

    def skip(self, n: int) -> list:
        return self[n:]


def sources(kind: str):
    if kind == "packed":
        return DocumentRows(listed(shuffle=True), 3, separator=0)
    if kind == "padded":
        return DocumentRows(listed(shuffle=True), 3, pack=False)
    if kind == "streamed":
        return DocumentRows(StreamedDocuments([{"text": d} for d in DOCS]), 3, separator=0)
    if kind == "skips":
        return DocumentRows(StreamedDocuments(CanSkip(DOCS)), 3, separator=0)
    if kind == "strided":
        return EveryNth(DocumentRows(listed(), 3, separator=0), 1, 2)
    parts = [(DocumentRows(listed(shuffle=True), 3), 3.0), (DocumentRows(ListedDocuments([[20, 21]]), 3), 1.0)]
    return MixedRows(parts, seed=5)


@pytest.mark.parametrize("kind", ["packed", "padded", "streamed", "skips", "strided", "mixed"])
def test_a_cursor_leads_back(kind: str) -> None:
    source = sources(kind)
    for _ in range(17):
        state = json.loads(json.dumps(source.state_dict()))
        expected = source.next_row()
        resumed = sources(kind)
        resumed.load_state_dict(state)
        again = resumed.next_row()
        assert torch.equal(again[0], expected[0])
        assert torch.equal(again[1], expected[1])


def test_mix_keeps_its_shares() -> None:
    parts = [(DocumentRows(ListedDocuments([[i]]), 1), weight) for i, weight in ((0, 0.85), (1, 0.15))]
    rows = take(MixedRows(parts), 2000)
    assert rows is not None
    assert 0.12 < rows.tokens.float().mean() < 0.18


def test_processes_share_a_source() -> None:
    whole = all_rows(DocumentRows(listed(), 3, epochs=1))
    parts = [all_rows(EveryNth(DocumentRows(listed(), 3, epochs=1), rank, 2)) for rank in (0, 1)]
    assert parts == [whole[0:4:2], whole[1:4:2]], "equally many each"
    assert len(whole) == 5


def test_a_generator_gives_one_pass_and_then_says_so() -> None:
    def once() -> Iterator[list[int]]:
        yield from DOCS

    source = DocumentRows(StreamedDocuments(once()), 4)
    with pytest.raises(ValueError, match="gave none: was a generator already exhausted"):
        take(source, 10)
    assert len(all_rows(DocumentRows(StreamedDocuments(once()), 4, epochs=1))) == 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ListedDocuments([]), "no documents"),
        (lambda: DocumentRows(listed(), 0), "length must be at least 1"),
        (lambda: DocumentRows(listed(), 4, epochs=0), "epochs must be"),
        (lambda: MixedRows([(sources("packed"), 1.0), (DocumentRows(listed(), 9), 1.0)]), "one length"),
        (lambda: MixedRows([(sources("packed"), 0.0)]), "weights must be"),
        (lambda: EveryNth(sources("packed"), 2, 2), "rank must be"),
        (lambda: take(DocumentRows(ListedDocuments([[], []]), 4), 1), "all documents are empty"),
    ],
)
def test_errors(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_documents_of_the_wrong_kind() -> None:
    with pytest.raises(TypeError, match="no tokenizer"):
        take(DocumentRows(ListedDocuments(["some text"]), 4), 1)
    with pytest.raises(TypeError, match="one row of token ids"):
        take(DocumentRows(ListedDocuments([torch.zeros(2, 2, dtype=torch.long)]), 4), 1)
    with pytest.raises(KeyError, match="no column 'text'; there are story"):
        take(DocumentRows(StreamedDocuments([{"story": "a"}]), 4), 1)


def test_text_files(tmp_path: Path) -> None:
    path = tmp_path / "stories.txt"
    path.write_text("One.\n<|endoftext|>\nTwo\nlines.\n<|endoftext|>\n", encoding="utf-8")
    assert read_text_file(path) == ["One.", "Two\nlines."]
    path.write_text(" <|endoftext|> ", encoding="utf-8")
    with pytest.raises(ValueError, match="holds no text"):
        read_text_file(path)


def test_digests_tell_texts_apart() -> None:
    assert ListedDocuments(["a", "b"]).digest() == ListedDocuments(["a", "b"]).digest()
    assert ListedDocuments(["a", "b"]).digest() != ListedDocuments(["a", "c"]).digest()
    assert DocumentRows(listed(), 4).digest() != DocumentRows(listed(), 5).digest()
    assert StreamedDocuments(DOCS).digest() == StreamedDocuments(iter_again()).digest()


def iter_again() -> list[list[int]]:
    return [list(doc) for doc in DOCS]
