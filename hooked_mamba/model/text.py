"""Text in and out: tokens, strings and losses, as TransformerLens names them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_mamba.config import ModelConfig
from hooked_mamba.names_elsewhere import knows_options
from hooked_mamba.transformerlens_names import GRANTED, OPTIONS

SPACE_MARK = "\u2581"
"""What stands for a space in SentencePiece's tokens."""

PaddingSide = Literal["left", "right"]


class TextMethods:
    """Tokenizer methods of a model.

    Unlike in TransformerLens, no BOS token is added unless `prepend_bos=True` (or the tokenizer adds one by itself):
    these models were trained without one.
    """

    cfg: ModelConfig
    tokenizer: Any
    embed: Any
    W_U: Any
    default_padding_side: PaddingSide = "right"
    """Where lists of texts are padded if a call does not say."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the embedding, and of most weights."""
        return self.embed.weight.dtype

    @knows_options(OPTIONS, GRANTED)
    def to_tokens(
        self,
        input: str | Sequence[str],
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        move_to_device: bool = True,
    ) -> Int[Tensor, "b l"]:
        """Token ids of text; a list is padded (on the right, unless `set_tokenizer` said otherwise) to its longest.

        A model given padded tokens needs their mask as well: pass the text itself, or use
        :meth:`to_tokens_and_mask`.
        """
        return self.to_tokens_and_mask(input, prepend_bos, padding_side, move_to_device)[0]

    def to_tokens_and_mask(
        self,
        input: str | Sequence[str],
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        move_to_device: bool = True,
    ) -> tuple[Int[Tensor, "b l"], Int[Tensor, "b l"]]:
        """Token ids of text and the attention mask: 1 for real tokens, 0 for padding."""
        self._needs_tokenizer("text input")
        texts = [input] if isinstance(input, str) else list(input)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"expected a string or a list of strings, got {input!r:.80}")
        side = padding_side or self.default_padding_side
        if side not in ("left", "right"):
            raise ValueError(f"padding_side must be 'left' or 'right', got {side!r}")
        rows = [self._ids(text, prepend_bos) for text in texts]
        for text, row in zip(texts, rows, strict=True):
            if not row:
                raise ValueError(
                    f"the prompt {text!r} has no tokens; pass prepend_bos=True to start from the BOS alone"
                )
        largest = max(map(max, rows))
        if largest >= self.cfg.d_vocab:
            raise IndexError(
                f"the tokenizer gives token id {largest} and the vocabulary has {self.cfg.d_vocab} rows:"
                " it belongs to another model"
            )
        length = max(map(len, rows))
        pad = self.pad_token_id
        tokens = torch.full((len(rows), length), pad if pad is not None else 0)
        mask = torch.zeros(len(rows), length, dtype=torch.long)
        for i, row in enumerate(rows):
            real = slice(length - len(row), length) if side == "left" else slice(0, len(row))
            tokens[i, real] = torch.tensor(row)
            mask[i, real] = 1
        device = self.device if move_to_device else "cpu"
        return tokens.to(device), mask.to(device)

    def to_string(self, tokens: Int[Tensor, "..."] | Sequence[int] | int) -> str | list[str]:
        """Text of one row of tokens, or a list of texts of several rows."""
        tokenizer = self._needs_tokenizer("to_string")
        ids = torch.as_tensor(tokens)
        if ids.ndim == 2:
            return [tokenizer.decode(row, clean_up_tokenization_spaces=False) for row in ids.tolist()]
        if ids.ndim > 2:
            raise ValueError(f"expected tokens of one or two axes, got {list(ids.shape)}")
        return tokenizer.decode(ids.reshape(-1).tolist(), clean_up_tokenization_spaces=False)

    @knows_options(OPTIONS, GRANTED)
    def to_str_tokens(
        self, input: str | Int[Tensor, "..."] | Sequence[Any], prepend_bos: bool | None = None
    ) -> list[str] | list[list[str]]:
        """Each token's own text: a list for one string or row, a list of lists for several strings."""
        if isinstance(input, list) and input and isinstance(input[0], str):
            return [self._str_tokens(text, prepend_bos) for text in input]
        return self._str_tokens(input, prepend_bos)

    def _str_tokens(self, input: str | Int[Tensor, "..."] | Sequence[Any], prepend_bos: bool | None) -> list[str]:
        """Each token's own text, for one string or row."""
        ids = self.to_tokens(input, prepend_bos)[0] if isinstance(input, str) else torch.as_tensor(input)
        if ids.ndim == 2 and ids.shape[0] == 1:
            ids = ids[0]
        if ids.ndim > 1:
            raise ValueError(f"to_str_tokens takes one row of tokens, got {list(ids.shape)}")
        tokenizer = self._needs_tokenizer("to_str_tokens")
        return [self._text_of(tokenizer, i) for i in ids.reshape(-1).tolist()]

    def _text_of(self, tokenizer: Any, token: int) -> str:
        """A token's text including the space that SentencePiece's marker stands for, which decoding drops at the start
        of a text."""
        text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
        name = tokenizer.convert_ids_to_tokens(token) if hasattr(tokenizer, "convert_ids_to_tokens") else None
        if not isinstance(name, str):
            return text
        missing = (len(name) - len(name.lstrip(SPACE_MARK))) - (len(text) - len(text.lstrip(" ")))
        return " " * missing + text

    def to_single_token(self, string: str) -> int:
        """The id of a string that is exactly one token."""
        ids = self._ids(string, prepend_bos=False)
        if len(ids) != 1:
            parts = self.to_str_tokens(torch.tensor(ids))
            spaced = " " + string
            hint = f"; {spaced!r} is one" if len(self._ids(spaced, prepend_bos=False)) == 1 else ""
            raise ValueError(f"{string!r} is not one token but {len(ids)}: {parts}{hint}")
        return ids[0]

    def to_single_str_token(self, int_token: int) -> str:
        """The text of one token id."""
        return self._str_tokens(torch.tensor([int_token]), None)[0]

    @knows_options(OPTIONS, GRANTED)
    def get_token_position(
        self,
        single_token: str | int,
        input: str | Int[Tensor, "..."] | Sequence[int],
        mode: Literal["first", "last"] = "first",
        prepend_bos: bool | None = None,
    ) -> int:
        """The first or last position of a token in a string or row of tokens."""
        ids = self.to_tokens(input, prepend_bos)[0] if isinstance(input, str) else torch.as_tensor(input)
        if ids.ndim == 2 and ids.shape[0] == 1:
            ids = ids[0]
        if ids.ndim != 1:
            raise ValueError(f"get_token_position takes one row of tokens, got {list(ids.shape)}")
        token = self.to_single_token(single_token) if isinstance(single_token, str) else single_token
        found = (ids == token).nonzero().flatten().tolist()
        if not found:
            raise ValueError(f"the token {single_token!r} does not occur in the input")
        if mode not in ("first", "last"):
            raise ValueError(f"mode must be 'first' or 'last', got {mode!r}")
        return found[0] if mode == "first" else found[-1]

    def tokens_to_residual_directions(
        self, tokens: str | int | Int[Tensor, "..."] | Sequence[int]
    ) -> Float[Tensor, "... d"]:
        """Unembedding columns of tokens: the residual directions that raise their logits (before the final norm)."""
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        ids = torch.as_tensor(tokens)
        return self.W_U[:, int(ids)] if ids.numel() == 1 else self.W_U.t()[ids]

    @property
    def pad_token_id(self) -> int | None:
        """What fills padded positions."""
        for name in ("pad_token_id", "eos_token_id"):
            found = self._special(name)
            if found is not None:
                return found[0] if isinstance(found, tuple) else found
        return None

    @property
    def bos_token_id(self) -> int | None:
        """The token that `prepend_bos=True` puts in front."""
        return self._special("bos_token_id")

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text; of several, the tokenizer's own or else the config's first."""
        found = self._special("eos_token_id")
        return found[0] if isinstance(found, tuple) else found

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every token at which generation stops: the tokenizer's, and where the config has several all of those."""
        mine, config = self.eos_token_id, self.cfg.eos_token_id
        return tuple(dict.fromkeys(t for t in (mine, *(config if isinstance(config, tuple) else ())) if t is not None))

    @property
    def d_vocab_real(self) -> int:
        """Rows of the embedding that stand for tokens, by the tokenizer or else the config; the rest is padding."""
        if self.tokenizer is not None:
            return min(len(self.tokenizer), self.cfg.d_vocab)
        return self.cfg.d_vocab if self.cfg.d_vocab_unpadded is None else self.cfg.d_vocab_unpadded

    def _special(self, name: str) -> Any:
        mine = getattr(self.tokenizer, name, None) if self.tokenizer is not None else None
        return mine if mine is not None else getattr(self.cfg, name)

    def _ids(self, text: str, prepend_bos: bool | None) -> list[int]:
        """Ids of one text. False also suppresses what the tokenizer itself would add; None leaves that to the
        tokenizer."""
        tokenizer = self._needs_tokenizer("text input")
        # transformers warns of texts longer than model_max_length, which is no limit of these models.
        quiet = {"verbose": False} if hasattr(tokenizer, "model_max_length") else {}
        if prepend_bos is False:
            return tokenizer(text, add_special_tokens=False, **quiet)["input_ids"]
        ids = tokenizer(text, **quiet)["input_ids"]
        if not prepend_bos:
            return ids
        bos = self.bos_token_id
        if bos is None:
            raise ValueError("prepend_bos=True, but neither the tokenizer nor the config knows a BOS token")
        return ids if ids[:1] == [bos] else [bos, *ids]

    def _needs_tokenizer(self, what: str) -> Any:
        if self.tokenizer is None:
            raise ValueError(
                f"{what} needs a tokenizer and this model has none: pass token ids, or set model.tokenizer"
                " or from_pretrained(..., tokenizer=...)"
            )
        return self.tokenizer


def lm_cross_entropy_loss(
    logits: Float[Tensor, "b l v"],
    tokens: Int[Tensor, "b l"],
    attention_mask: Tensor | None = None,
    per_token: bool = False,
    starts: Bool[Tensor, "b l"] | None = None,
) -> Float[Tensor, ""] | Float[Tensor, "b m"]:
    """Cross-entropy of each next token in nats: the mean, or with `per_token` all l - 1 values.

    With a mask, pairs that touch padding are left out of the mean and are 0 in the per-token losses; so are tokens that
    start a document, by `starts`.
    """
    log_probs = logits[:, :-1].log_softmax(-1)
    losses = -log_probs.gather(-1, tokens[:, 1:, None].to(logits.device))[..., 0]
    if attention_mask is None and starts is None:
        return losses if per_token else losses.mean()
    real = torch.ones_like(losses)
    if attention_mask is not None:
        real = (attention_mask[:, 1:] * attention_mask[:, :-1]).to(losses.dtype)
    if starts is not None:
        real = real * ~starts[:, 1:]
    losses = torch.where(real.bool(), losses, torch.zeros_like(losses))
    return losses if per_token else losses.sum() / real.sum()
