"""Train a byte-level BPE tokenizer and write it as transformers reads it.

    python -m demos.tinystories.tokenizer --text train.txt --out runs/tokenizer --generated 6000

Byte-level: any text at all can be encoded and comes back unchanged; there is no unknown token.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from demos.tinystories.grammar import tell_stories
from demos.tinystories.text import END, read_stories

D_VOCAB = 3072
"""Entries, the 256 bytes and the end-of-text token included; divisible by 16, so that no padding rows are needed."""
MAX_LENGTH = 2048
"""What the tokenizer reports as its model's length; the recurrence itself has no limit."""


def train_tokenizer(stories: Iterable[str], d_vocab: int = D_VOCAB) -> Tokenizer:
    """Train byte-level BPE whose token 0 is `<|endoftext|>`.

    Parameters
    ----------
    stories : iterable of str
        Training text.
    d_vocab : int
        Number of entries wanted; a tiny text may give fewer.

    Raises
    ------
    ValueError
        If `d_vocab` does not even hold the bytes.
    """
    if d_vocab < 257:
        raise ValueError(f"d_vocab must hold 256 bytes and {END!r}: expected at least 257, got {d_vocab}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=d_vocab,
        min_frequency=2,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(stories, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path | str, trained_on: str) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json; `trained_on` is kept for model cards."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": END, "eos_token": END, "pad_token": END, "unk_token": END}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_LENGTH,
        "padding_side": "left",
        "trained_on": trained_on,
        **special,
    }
    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", special)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_tokenizer(folder: Path | str) -> PreTrainedTokenizerFast:
    """The saved tokenizer, as transformers loads it.

    Raises
    ------
    FileNotFoundError
        If the folder has no tokenizer.json.
    """
    if not (Path(folder) / "tokenizer.json").is_file():
        raise FileNotFoundError(
            f"{folder} has no tokenizer.json; make one with `python -m demos.tinystories.tokenizer`"
        )
    return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)


def describe_text(real: int, generated: int) -> str:
    """What a tokenizer was trained on, for `save_tokenizer`."""
    return f"{real:,} real and {generated:,} generated stories"


def encode_stream(tokenizer: PreTrainedTokenizerFast, stories: Iterable[str]) -> list[int]:
    """One flat stream of token ids: `<|endoftext|>`, a story, `<|endoftext|>`, ..., `<|endoftext|>`."""
    end = tokenizer.convert_tokens_to_ids(END)
    stream = [end]
    for encoding in tokenizer.backend_tokenizer.encode_batch(list(stories), add_special_tokens=False):
        stream += encoding.ids
        stream.append(end)
    return stream


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train a byte-level BPE tokenizer.", allow_abbrev=False)
    parser.add_argument("--text", type=Path, required=True, help="story file to train on")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--d-vocab", type=int, default=D_VOCAB, help="entries (default: %(default)s)")
    parser.add_argument("--generated", type=int, default=6000, help="stories of the grammar added to the text")
    parser.add_argument("--seed", type=int, default=0, help="seed of those stories")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Train, save, and say how well words are covered."""
    args = parse_args(argv)
    real = read_stories(args.text)
    tokenizer = train_tokenizer([*real, *tell_stories(args.generated, args.seed)], args.d_vocab)
    save_tokenizer(tokenizer, args.out, describe_text(len(real), args.generated))
    loaded = load_tokenizer(args.out)
    characters = sum(map(len, real))
    tokens = len(encode_stream(loaded, real))
    print(f"{len(loaded)} entries; {characters / tokens:.3f} characters a token on {args.text}; saved to {args.out}")


if __name__ == "__main__":
    main()
