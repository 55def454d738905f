"""RWKV's "world" tokenizer: greedy longest match on bytes.

Its vocabulary is a text file of lines `id repr length`, in which repr is a Python literal of a str or of bytes; ids
begin at 1, and 0 ends a text. A text is cut from left to right: each token is the longest of the vocabulary that the
bytes continue with.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from hooked_mamba.loading.tables import CheckpointError

__all__ = ["VOCABULARY", "WorldTokenizer", "find_world_tokenizer"]

VOCABULARY = "rwkv_vocab_v20230424.txt"
"""The file's name wherever it is published."""

END = "<|endoftext|>"
"""How id 0 is shown. As text this is what it says and no special token: official code knows none."""


class WorldTokenizer:
    """Text to ids and back.

    Called with a text or a list of them it gives `{"input_ids": ...}`, as tokenizers of transformers do. No token is
    put in front. Ids that are not in the vocabulary read as nothing; bytes that are no whole UTF-8 read as U+FFFD.

    Parameters
    ----------
    tokens
        Pairs (id, bytes).

    Raises
    ------
    CheckpointError
        Two tokens of one id, two of the same bytes, or an empty one.
    """

    bos_token_id = eos_token_id = pad_token_id = 0
    bos_token = eos_token = pad_token = END

    def __init__(self, tokens: Iterable[tuple[int, bytes]]) -> None:
        self.bytes_of: dict[int, bytes] = {}
        self.id_of: dict[bytes, int] = {}
        self._longest: dict[bytes, int] = {}
        for id, token in tokens:
            if id in self.bytes_of or token in self.id_of or not token or id < 1:
                raise CheckpointError(f"token {id} is {token!r}; expected ids from 1 on and bytes, each of them once")
            self.bytes_of[id], self.id_of[token] = token, id
            start = token[:2]
            self._longest[start] = max(self._longest.get(start, 0), len(token))

    @classmethod
    def from_file(cls, path: str | Path) -> WorldTokenizer:
        """Read a vocabulary file; its literals are parsed, nothing in it is run.

        Raises
        ------
        CheckpointError
            No such file, or a line that is not `id repr length`.
        """
        path = Path(path).expanduser()
        if not path.is_file():
            raise CheckpointError(f"{path} is not there; expected a vocabulary such as {VOCABULARY}")
        return cls(_parsed(path))

    @classmethod
    def installed(cls) -> WorldTokenizer:
        """The vocabulary that comes with the package `rwkv`, which is found and not imported.

        Raises
        ------
        CheckpointError
            The package is not installed.
        """
        path = _installed_file()
        if path is None:
            raise CheckpointError(
                f"the package rwkv, whose data holds {VOCABULARY}, is not installed: install it, or give the file's"
                " path as tokenizer="
            )
        return cls.from_file(path)

    def __len__(self) -> int:
        """One more than the largest id."""
        return max(self.bytes_of, default=0) + 1

    # To ids --------------------------------------------------------------------------------------------------

    def encode(self, text: str | bytes, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text; there are no special tokens to add.

        Raises
        ------
        ValueError
            A byte that no token begins with.
        """
        data = text.encode("utf-8") if isinstance(text, str) else text
        ids, at = [], 0
        while at < len(data):
            longest = self._longest.get(data[at : at + 2], 1)
            for length in range(min(longest, len(data) - at), 0, -1):
                id = self.id_of.get(data[at : at + length])
                if id is not None:
                    ids.append(id)
                    at += length
                    break
            else:
                raise ValueError(f"no token begins with the byte {data[at : at + 1]!r} at {at}")
        return ids

    def __call__(self, text: str | Sequence[str], add_special_tokens: bool = True, **_: Any) -> dict[str, Any]:
        """`{"input_ids": ids}` of a text, or a list of ids for each of several."""
        if isinstance(text, str):
            return {"input_ids": self.encode(text)}
        return {"input_ids": [self.encode(one) for one in text]}

    # From ids ------------------------------------------------------------------------------------------------

    def decode_bytes(self, ids: Iterable[int] | Tensor) -> bytes:
        """The bytes of ids; id 0, and ids without a token, have none."""
        return b"".join(self.bytes_of.get(int(id), b"") for id in ids)

    def decode(self, ids: Iterable[int] | Tensor | int, skip_special_tokens: bool = False, **_: Any) -> str:
        """The text of ids; id 0 is shown as "<|endoftext|>" unless it is to be skipped."""
        numbers = [ids] if isinstance(ids, int) else [int(id) for id in ids]
        end = b"" if skip_special_tokens else END.encode()
        return b"".join(self.bytes_of.get(id, b"") if id else end for id in numbers).decode("utf-8", errors="replace")

    def batch_decode(self, rows: Iterable[Iterable[int]], **options: Any) -> list[str]:
        """The texts of several rows of ids."""
        return [self.decode(row, **options) for row in rows]

    def convert_ids_to_tokens(self, ids: Sequence[int] | int) -> list[str] | str:
        """Each token as text; bytes that are no whole character as in b'\\xe4'."""
        if isinstance(ids, int):
            return self._shown(ids)
        return [self._shown(int(id)) for id in ids]

    def convert_tokens_to_ids(self, tokens: Sequence[str] | str) -> list[int | None] | int | None:
        """The inverse of :meth:`convert_ids_to_tokens`; None for what is no token."""
        if isinstance(tokens, str):
            return self._ids_by_text().get(tokens)
        return [self._ids_by_text().get(token) for token in tokens]

    def _shown(self, id: int) -> str:
        if id == 0:
            return END
        token = self.bytes_of.get(id, b"")
        try:
            return token.decode("utf-8")
        except UnicodeDecodeError:
            return repr(token)

    def _ids_by_text(self) -> dict[str, int]:
        if not hasattr(self, "_by_text"):
            # A token that is a character's own text comes before one that only looks like the repr of bytes.
            self._by_text = {self._shown(id): id for id in reversed([0, *self.bytes_of])}
        return self._by_text

    # To disk -------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> tuple[str, ...]:
        """Write the vocabulary into a folder, as it is published."""
        path = Path(folder) / VOCABULARY
        with path.open("w", encoding="utf-8", newline="\n") as file:
            for id, token in self.bytes_of.items():
                try:
                    literal = repr(token.decode("utf-8"))
                except UnicodeDecodeError:
                    literal = repr(token)
                file.write(f"{id} {literal} {len(token)}\n")
        return (str(path),)


def find_world_tokenizer(folder: Path | None, d_vocab: int) -> WorldTokenizer | None:
    """The vocabulary of a checkpoint's folder, or the installed one for a model of 65,536 rows; None without any."""
    if folder is not None and (folder / VOCABULARY).is_file():
        return WorldTokenizer.from_file(folder / VOCABULARY)
    path = _installed_file()
    return WorldTokenizer.from_file(path) if path is not None and d_vocab == 2**16 else None


def _installed_file() -> Path | None:
    """Where the package `rwkv` keeps the vocabulary; looked up without importing it."""
    spec = importlib.util.find_spec("rwkv")
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        if (Path(place) / VOCABULARY).is_file():
            return Path(place) / VOCABULARY
    return None


def _parsed(path: Path) -> Iterable[tuple[int, bytes]]:
    with path.open(encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, 1):
            try:
                id, rest = line.rstrip("\r\n").split(" ", 1)
                literal, length = rest.rsplit(" ", 1)
                token = ast.literal_eval(literal)
                token = token.encode("utf-8") if isinstance(token, str) else token
                if not isinstance(token, bytes) or len(token) != int(length):
                    raise ValueError("the length is not that of the token")
                yield int(id), token
            except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
                raise CheckpointError(
                    f"line {number} of {path} is {line[:60]!r}; expected `id literal length`: {error}"
                ) from None
