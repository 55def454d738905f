"""The store: shuffled, aligned, resumable; and its shards on disk, which are whole or an error."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from hooked_mamba import HookedMamba, MambaConfig, durable
from saes.store import (
    ActivationStore,
    Capture,
    DiskBlocks,
    DiskFullError,
    DocumentRows,
    ListedDocuments,
    MemoryBlocks,
    ModelBlocks,
    Rows,
    ShardReader,
    StoreError,
    capture_to_disk,
    capture_to_memory,
    read_text_file,
    take,
)

STREAMS = ["blocks.0.norm.hook_out", "blocks.0.mixer.hook_out_proj"]
SECRET = 13
"""A token id that would be seen if text were stored."""


def model() -> HookedMamba:
    return HookedMamba(MambaConfig(d_model=8, n_layers=1, d_vocab=17, d_state=3), seed=0)


def rows(epochs: int | None = None) -> DocumentRows:
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(17, (n,), generator=generator).tolist() for n in (30, 7, 55, 21, 12)]
    return DocumentRows(ListedDocuments(documents), 10, epochs=epochs)


def model_blocks(dtype: torch.dtype = torch.float32, epochs: int | None = None) -> ModelBlocks:
    return ModelBlocks(Capture(model(), STREAMS, dtype=dtype), rows(epochs), tokens=64, rows_per_pass=3)


def disk_blocks(folder: Path, epochs: int | None = None) -> DiskBlocks:
    return DiskBlocks(ShardReader(folder), shards=2, epochs=epochs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return capture_to_disk(model_blocks(), tmp_path_factory.mktemp("store") / "s", 300)


def numbers(n: int = 50) -> dict[str, torch.Tensor]:
    i = torch.arange(n, dtype=torch.float32)
    return {"a": i[:, None].repeat(1, 2), "b": -i[:, None]}


def test_a_pass_gives_every_position_once_shuffled_and_aligned() -> None:
    store = ActivationStore(MemoryBlocks(numbers(), epochs=2), 10)
    batches = list(store)
    assert len(batches) == 10
    for batch in batches:
        assert batch["a"].shape == (10, 2)
        assert torch.equal(batch["a"][:, :1], -batch["b"])
    first, second = (torch.cat([batch["a"][:, 0] for batch in part]) for part in (batches[:5], batches[5:]))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(50))
    assert not torch.equal(first, second)
    assert first.tolist() != sorted(first.tolist())


def test_a_remainder_smaller_than_a_batch_is_left_and_another_one_each_pass() -> None:
    batches = list(ActivationStore(MemoryBlocks(numbers(), epochs=3), 20))
    assert len(batches) == 6
    left = [set(range(50)) - {int(i) for b in batches[p : p + 2] for i in b["a"][:, 0]} for p in (0, 2, 4)]
    assert [len(part) for part in left] == [10, 10, 10]
    assert left[0] != left[1]


@pytest.mark.parametrize("kind", ["memory", "model", "disk"])
def test_a_resumed_store_goes_on_bit_for_bit(kind: str, folder: Path) -> None:
    def make() -> ActivationStore:
        blocks = {
            "memory": lambda: MemoryBlocks(numbers()),
            "model": model_blocks,
            "disk": lambda: disk_blocks(folder),
        }[kind]()
        return ActivationStore(blocks, 12, seed=4)

    store = make()
    for _ in range(25):
        state = json.loads(json.dumps(store.state_dict()))
        expected = next(store)
        resumed = make()
        resumed.load_state_dict(state)
        for other in (next(resumed),):
            assert all(torch.equal(other[name], value) for name, value in expected.items())
    assert make().digest() == store.digest()
    with pytest.raises(ValueError, match="seed 4, this one has 5"):
        ActivationStore(make().blocks, 12, seed=5).load_state_dict(state)


def test_sample_leaves_the_cursor() -> None:
    store = ActivationStore(model_blocks(), 12)
    sample = store.sample(30)
    assert len(sample[STREAMS[0]]) == 30
    assert torch.equal(next(store)[STREAMS[0]], sample[STREAMS[0]][:12])
    fresh = ActivationStore(model_blocks(), 12)
    next(fresh)
    assert fresh.state_dict() == store.state_dict()


def test_stores_end_and_say_when_they_are_too_small() -> None:
    assert len(list(ActivationStore(MemoryBlocks(numbers(), epochs=1), 50))) == 1
    with pytest.raises(ValueError, match="gave 50 positions at once, fewer than one batch of 51"):
        next(ActivationStore(MemoryBlocks(numbers(), epochs=1), 51))
    store = ActivationStore(MemoryBlocks(numbers(), epochs=1), 50)
    next(store)
    with pytest.raises(ValueError, match="is exhausted"):
        store.sample(1)
    with pytest.raises(ValueError, match="batch_size"):
        ActivationStore(MemoryBlocks(numbers()), 0)
    with pytest.raises(ValueError, match="one number of rows"):
        MemoryBlocks({"a": torch.zeros(3, 2), "b": torch.zeros(4, 2)})


def test_memory_and_disk_hold_what_the_model_gives(tmp_path: Path) -> None:
    values = capture_to_memory(Capture(model(), STREAMS), rows(), 100)
    assert {len(v) for v in values.values()} == {100}
    store = capture_to_disk(model_blocks(torch.bfloat16, epochs=1), tmp_path / "s", 10**6)
    reader = ShardReader(store)
    assert reader.manifest["tokens"] == 125 == sum(s["tokens"] for s in reader.shards), "all the text there is"
    joined = torch.cat([reader.read(i)[STREAMS[0]] for i in range(len(reader.shards))])
    assert joined.dtype == torch.bfloat16
    assert torch.equal(joined[:100], values[STREAMS[0]].bfloat16())


def test_the_manifest_says_what_is_there_and_no_text(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["streams"] == {STREAMS[0]: 8, STREAMS[1]: 8}
    assert manifest["dtype"] == "float32"
    assert manifest["context_length"] == 10
    assert len(manifest["model_hash"]) == 16
    assert manifest["tokens"] >= 300
    assert manifest["cursor"].keys() == {"block", "rows"}
    assert manifest["cursor"]["rows"].keys() == {"epoch", "document", "offset"}
    assert set(ShardReader(folder).read(0)) == set(STREAMS)


def test_capture_goes_on_where_it_stopped(tmp_path: Path, folder: Path) -> None:
    part = tmp_path / "part"
    capture_to_disk(model_blocks(), part, 100)
    (part / ".shard-00002.safetensors.tmp").write_bytes(b"half a shard")
    capture_to_disk(model_blocks(), part, 300)
    assert sorted(path.name for path in part.iterdir()) == sorted(path.name for path in folder.iterdir())
    assert json.loads((part / "manifest.json").read_text()) == json.loads((folder / "manifest.json").read_text())
    with pytest.raises(StoreError, match="holds another store: its dtype is 'float32', this one's 'bfloat16'"):
        capture_to_disk(model_blocks(torch.bfloat16), part, 300)


def damaged(folder: Path, tmp_path: Path, how: str) -> Path:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    shard, manifest = copy / "shard-00001.safetensors", copy / "manifest.json"
    data = shard.read_bytes()
    content = json.loads(manifest.read_text())
    if how == "torn":
        shard.write_bytes(data[:-10])
    elif how == "missing":
        shard.unlink()
    elif how == "flipped":
        shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif how == "manifest torn":
        manifest.write_text(manifest.read_text()[:-30])
    elif how == "manifest of another format":
        manifest.write_text(json.dumps(content | {"format": "x"}))
    elif how == "lying count":
        manifest.write_text(json.dumps(content | {"tokens": 1}))
    elif how == "path":
        content["shards"][1]["file"] = "../copy/shard-00001.safetensors"
        manifest.write_text(json.dumps(content))
    elif how == "lying width":
        content["streams"][STREAMS[0]] = 9
        manifest.write_text(json.dumps(content))
    elif how == "no dtype":
        del content["dtype"]
        manifest.write_text(json.dumps(content))
    elif how == "no safetensors":
        import hashlib

        shard.write_bytes(b"\xff" * len(data))
        content["shards"][1]["sha256"] = hashlib.sha256(shard.read_bytes()).hexdigest()
        manifest.write_text(json.dumps(content))
    return copy


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("torn", "shard-00001.* has .* bytes, the manifest says"),
        ("missing", "shard-00001.* is missing"),
        ("flipped", "shard-00001.* is damaged: its checksum"),
        ("manifest torn", "is no JSON"),
        ("manifest of another format", "has the format 'x', expected"),
        ("lying count", "contradicts itself"),
        ("path", "contradicts itself"),
        ("lying width", r"expected torch.float32 \[\d+, 9\]"),
        ("no dtype", "lacks 'dtype'"),
        ("no safetensors", "is no safetensors file"),
    ],
)
def test_damage_is_an_error_that_names_the_file(folder: Path, tmp_path: Path, how: str, message: str) -> None:
    copy = damaged(folder, tmp_path, how)
    with pytest.raises(StoreError, match=message):
        list(ActivationStore(disk_blocks(copy, epochs=1), 12))


def test_no_store_and_unknown_streams(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no store"):
        ShardReader(tmp_path)
    with pytest.raises(StoreError, match="no stream 'x'; it holds blocks"):
        ShardReader(folder, ["x"])
    assert ShardReader(folder, STREAMS[:1]).read(0).keys() == {STREAMS[0]}
    with pytest.raises(ValueError, match="9 processes cannot share"):
        DiskBlocks(ShardReader(folder), world=9)
    with pytest.raises(ValueError, match="must be one of float32, bfloat16, float16"):
        capture_to_disk(model_blocks(torch.float64), tmp_path / "s", 1)


def test_a_full_disk_is_an_error_and_the_store_stays_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = capture_to_disk(model_blocks(), tmp_path / "s", 100)
    before = {path.name: path.read_bytes() for path in store.iterdir()}
    usage = shutil.disk_usage(store)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
        with pytest.raises(DiskFullError, match="has room for 100 bytes"):
            capture_to_disk(model_blocks(), store, 300)

    def fails_midway(path: Path, data: bytes) -> None:
        path.write_bytes(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(durable, "write_through", fails_midway)
        with pytest.raises(DiskFullError, match=r"no room for .* bytes of shard-00002"):
            capture_to_disk(model_blocks(), store, 300)
    assert {path.name: path.read_bytes() for path in store.iterdir()} == before
    assert ShardReader(capture_to_disk(model_blocks(), store, 300)).manifest["tokens"] >= 300


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_really_full_device() -> None:
    with pytest.raises(OSError, match="No space left") as caught:
        durable.write_through(Path("/dev/full"), b"x" * 10**5)
    assert caught.value.errno == errno.ENOSPC


def test_processes_share_shards(folder: Path) -> None:
    reader = ShardReader(folder)
    n = len(reader.shards) // 2 * 2
    parts = [DiskBlocks(reader, epochs=1, rank=rank, world=2) for rank in (0, 1)]
    sums = [[float(b[STREAMS[0]].sum()) for b in iter(part.next_block, None)] for part in parts]
    assert len(sums[0]) == len(sums[1]) == n // 2
    assert not set(sums[0]) & set(sums[1])


def test_a_text_taken_for_a_path():
    for text in ("Once upon a time", "Once upon a time. " * 500):
        with pytest.raises(FileNotFoundError, match="pass the text itself in a list") as caught:
            read_text_file(text)
        assert len(str(caught.value)) < 300


def test_documents_of_a_packed_row_are_kept_apart() -> None:
    """What is captured of each document, cut where its row is, is what the model gives for that piece alone."""
    made, documents = model().double(), [[1, 2, 3, 4, 5, 6, 7], [8], [9, 10, 11, 12], [13, 14, 15, 16, 3, 2, 1]]
    source = DocumentRows(ListedDocuments(documents, shuffle=False), 6, epochs=1, boundaries=True)
    packed = take(source, 9)
    assert packed is not None
    assert packed.document_ids is not None
    got = Capture(made, STREAMS, dtype=torch.float64)(packed)
    pieces = []
    for tokens, real, ids in zip(*packed, strict=True):
        for i in ids[real].unique(sorted=True):
            row = tokens[real & (ids == i)][None]
            pieces.append(Capture(made, STREAMS, dtype=torch.float64)(Rows(row, torch.ones_like(row).bool())))
    assert len(pieces) == 6  # two of them are cut by a row's end
    for stream in STREAMS:
        expected = torch.cat([piece[stream] for piece in pieces])
        torch.testing.assert_close(got[stream], expected, rtol=1e-12, atol=1e-12)
    as_one = Capture(made, STREAMS, dtype=torch.float64)(Rows(packed.tokens, packed.real))
    assert not torch.allclose(as_one[STREAMS[1]], got[STREAMS[1]])
