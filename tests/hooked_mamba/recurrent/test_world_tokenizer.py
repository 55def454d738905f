"""The world tokenizer: greedy longest match on bytes, from a file in which nothing is run."""

from __future__ import annotations

import importlib.util
import random

import pytest
import torch

from hooked_mamba.loading import CheckpointError
from hooked_mamba.loading.world_tokenizer import VOCABULARY, WorldTokenizer, find_world_tokenizer

WORDS = ["a", "b", "ab", "abc", "abcde", " ", "  ", "\n", "é", "é ", "中", "中文", "'", '"', "b'x'"]


def vocabulary(extra: tuple[bytes, ...] = ()) -> list[tuple[int, bytes]]:
    single = [bytes([i]) for i in range(256)]
    longer = [word.encode() for word in WORDS if len(word.encode()) > 1]
    return list(enumerate([*single, *longer, *extra], 1))


@pytest.fixture(scope="module")
def tokenizer() -> WorldTokenizer:
    return WorldTokenizer(vocabulary())


def longest_match(tokens: list[tuple[int, bytes]], data: bytes) -> list[int]:
    """All tokens tried at every place."""
    ids = []
    while data:
        id, token = max(((i, t) for i, t in tokens if data.startswith(t)), key=lambda pair: len(pair[1]))
        ids.append(id)
        data = data[len(token) :]
    return ids


def random_text(rng: random.Random) -> str:
    return "".join(rng.choice([*WORDS, "abcd", "x", "ü", "😀", "\x00"]) for _ in range(rng.randrange(30)))


def test_the_longest_token_is_taken(tokenizer):
    rng, tokens = random.Random(0), vocabulary()
    for _ in range(300):
        text = random_text(rng)
        ids = tokenizer.encode(text)
        assert ids == longest_match(tokens, text.encode())
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode_bytes(ids) == text.encode()


def test_longest_is_not_misled_by_a_shorter_start(tokenizer):
    """abcd: no token, though abcde is one; the match goes back to abc."""
    assert tokenizer.decode_bytes(tokenizer.encode("abcd")[:1]) == b"abc"
    assert tokenizer.decode_bytes(tokenizer.encode("abcde")[:1]) == b"abcde"
    assert tokenizer.encode("") == []


def test_as_tokenizers_of_transformers_are_called(tokenizer):
    assert tokenizer("ab") == {"input_ids": tokenizer.encode("ab")}
    both = tokenizer(["ab", "c"], add_special_tokens=False)
    assert both == {"input_ids": [tokenizer.encode("ab"), tokenizer.encode("c")]}
    assert tokenizer.batch_decode(both["input_ids"]) == ["ab", "c"]
    assert tokenizer.decode(torch.tensor(tokenizer.encode("ab"))) == "ab"
    assert len(tokenizer) == max(id for id, _ in vocabulary()) + 1


def test_id_0_ends_a_text(tokenizer):
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 0, 0)
    ids = tokenizer.encode("a<|endoftext|>")
    assert 0 not in ids
    assert tokenizer.decode([0, *tokenizer.encode("a")]) == "<|endoftext|>a"
    assert tokenizer.decode([0, *tokenizer.encode("a")], skip_special_tokens=True) == "a"


def test_tokens_that_are_no_text(tokenizer):
    start, end = "é".encode()
    ids = [start + 1, end + 1]
    assert tokenizer.decode(ids) == "é"
    assert tokenizer.decode(ids[:1]) == "�"
    assert tokenizer.convert_ids_to_tokens(ids) == [r"b'\xc3'", r"b'\xa9'"]
    everything = [0, *tokenizer.bytes_of]
    assert tokenizer.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens(everything)) == everything
    assert tokenizer.convert_ids_to_tokens(0) == "<|endoftext|>"
    assert tokenizer.convert_tokens_to_ids("nowhere") is None


def test_written_and_read_back(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = WorldTokenizer.from_file(tmp_path / VOCABULARY)
    assert again.bytes_of == tokenizer.bytes_of
    assert find_world_tokenizer(tmp_path, 300).bytes_of == tokenizer.bytes_of


@pytest.mark.parametrize(
    "line",
    ["1 'a'", "one 'a' 1", "1 'a' 2", "1 ['a'] 1", "1 __import__('os').getcwd() 3", "1 3 1", "1 'a", ""],
)
def test_a_line_that_is_no_token(tmp_path, line):
    (tmp_path / "v.txt").write_text(f"2 'b' 1\n{line}\n")
    with pytest.raises(CheckpointError, match="line 2 of"):
        WorldTokenizer.from_file(tmp_path / "v.txt")


@pytest.mark.parametrize("tokens", [[(1, b"a"), (1, b"b")], [(1, b"a"), (2, b"a")], [(1, b"")], [(0, b"a")]])
def test_a_vocabulary_with_two_of_one(tokens):
    with pytest.raises(CheckpointError, match="each of them once"):
        WorldTokenizer(tokens)


def test_other_errors(tmp_path):
    with pytest.raises(CheckpointError, match="is not there"):
        WorldTokenizer.from_file(tmp_path / "none.txt")
    with pytest.raises(ValueError, match=r"no token begins with the byte b'z' at 1"):
        WorldTokenizer([(1, b"a")]).encode("az")
    assert find_world_tokenizer(tmp_path, 300) is None


def test_without_the_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="package rwkv"):
        WorldTokenizer.installed()
    assert find_world_tokenizer(None, 2**16) is None


@pytest.mark.peer
def test_equal_to_the_official_trie():
    pytest.importorskip("rwkv")
    from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

    ours = WorldTokenizer.installed()
    theirs = TRIE_TOKENIZER(importlib.util.find_spec("rwkv").submodule_search_locations[0] + "/" + VOCABULARY)
    assert ours.bytes_of == theirs.idx2token
    rng = random.Random(0)
    texts = [random_text(rng) for _ in range(300)]
    texts += [
        "".join(chr(rng.choice([rng.randrange(1, 0xD800), rng.randrange(32, 127)])) for _ in range(60))
        for _ in range(300)
    ]
    texts += [
        "".join(ours.bytes_of[rng.randrange(1, 65530)].decode(errors="ignore") for _ in range(20)) for _ in range(300)
    ]
    for text in texts:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == text
