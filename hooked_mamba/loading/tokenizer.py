"""The tokenizer that goes with a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hooked_mamba.loading.tables import CheckpointError
from hooked_mamba.loading.world_tokenizer import VOCABULARY, WorldTokenizer

PLAIN = "PreTrainedTokenizerFast"
"""The class, in every release of transformers, whose all is in tokenizer.json."""
WRITTEN = ("TokenizersBackend", "PreTrainedTokenizer")
"""What transformers 5 and 4 call it in files; neither name is known to, or means the same in, the other."""
OF_ONE_MACHINE = ("is_local", "local_files_only")
"""What transformers 5 writes of how a tokenizer was read."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def load_tokenizer(tokenizer: Any, folder: Path | None, own: Any = None) -> Any:
    """A tokenizer object as it is; a local path or hub id loaded; with None the checkpoint's own, where it has one.

    Parameters
    ----------
    tokenizer
        An object, a folder, a hub id, or the path of a world vocabulary (`.txt`).
    folder
        The checkpoint's.
    own
        A tokenizer of the checkpoint that was found already.

    Raises
    ------
    CheckpointError, OSError
        There is none, or the hub cannot be reached.
    """
    if tokenizer is None and own is not None:
        return own
    if tokenizer is None:
        if folder is None or not any((folder / name).exists() for name in TOKENIZER_FILES):
            return None  # the model then takes token ids only, and says so when text comes
        tokenizer = folder
    if not isinstance(tokenizer, str | Path):
        return tokenizer
    place = Path(tokenizer).expanduser()
    if place.suffix == ".txt":
        return WorldTokenizer.from_file(place)
    if (place / VOCABULARY).is_file():
        return WorldTokenizer.from_file(place / VOCABULARY)
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # slow to import, and token ids need none

    if place.is_absolute() and not place.exists():
        raise CheckpointError(f"no tokenizer at {place}: there is no such file or folder")
    if _is_plain(place):  # AutoTokenizer reads config.json too, and warns of models that transformers does not have
        return PreTrainedTokenizerFast.from_pretrained(str(place))
    try:
        return AutoTokenizer.from_pretrained(str(tokenizer))
    except (OSError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        kind = OSError if isinstance(error, OSError) else CheckpointError
        raise kind(
            f"no tokenizer loads from {str(tokenizer)!r}: {first}. Give a folder with tokenizer.json, a hub id"
            " or a tokenizer object"
        ) from None


def _is_plain(folder: Path) -> bool:
    """Whether a folder's tokenizer is all in its tokenizer.json."""
    said = folder / "tokenizer_config.json"
    if not said.is_file() or not (folder / "tokenizer.json").is_file():
        return False
    try:
        return json.loads(said.read_text(encoding="utf-8")).get("tokenizer_class") in (PLAIN, *WRITTEN)
    except (ValueError, AttributeError):
        return False  # transformers says what is wrong


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer's files, under a class that transformers 4 knows as well as 5."""
    tokenizer.save_pretrained(folder)
    file = Path(folder) / "tokenizer_config.json"
    if not file.is_file():
        return  # a tokenizer of another kind
    fields = json.loads(file.read_text(encoding="utf-8"))
    if fields.get("tokenizer_class") in WRITTEN and (Path(folder) / "tokenizer.json").is_file():
        fields["tokenizer_class"] = PLAIN
    kept = {name: value for name, value in fields.items() if name not in OF_ONE_MACHINE}
    file.write_text(json.dumps(kept, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
