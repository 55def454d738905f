"""Generation: read the prompt once, then one position per step, with every hook in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from hooked_mamba.hooks.points import StateHookPoint
from hooked_mamba.model.beam_search import Rules, beam_search
from hooked_mamba.model.text import PaddingSide
from hooked_mamba.names_elsewhere import knows_options
from hooked_mamba.state import ModelState, Padding
from hooked_mamba.transformerlens_names import GRANTED, OPTIONS


def sample_logits(
    logits: Float[Tensor, "b v"],
    top_k: int | None = None,
    top_p: float | None = None,
    temperature: float = 1.0,
    freq_penalty: float = 0.0,
    tokens: Int[Tensor, "b l"] | None = None,
    attention_mask: Int[Tensor, "b m"] | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, " b"]:
    """Draw one token per row.

    Parameters
    ----------
    top_k
        Only the k likeliest tokens.
    top_p
        Only the likeliest tokens that together reach this probability, always at least one.
    temperature
        Divides the logits; 0 is greedy.
    freq_penalty
        Subtracted from a token's logit for every time it occurs in `tokens`, padding excluded.
    """
    if temperature < 0:
        raise ValueError(f"temperature must be 0 or more, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be 1 or more, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    logits = logits.float()
    if freq_penalty and tokens is not None:
        seen = torch.ones_like(tokens) if attention_mask is None else attention_mask
        counts = torch.zeros_like(logits).scatter_add_(1, tokens, seen.to(logits.dtype))
        logits = logits - freq_penalty * counts
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # probability of the likelier ones
        logits = logits.scatter(1, order, ordered.masked_fill(before >= top_p, -torch.inf))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


class Generation:
    """`generate`, for a model with TextMethods and a forward that takes and returns its state."""

    columns_before: int | None = None
    """Columns of earlier calls while `generate` runs; None outside of it."""
    rows_move: bool = False
    """Whether a beam search is under way, whose calls have their rows in different orders."""

    @knows_options(OPTIONS, GRANTED)
    @torch.no_grad()
    def generate(
        self,
        input: str | Sequence[Any] | Tensor = "",
        max_new_tokens: int = 10,
        stop_at_eos: bool = True,
        eos_token_id: int | Sequence[int] | None = None,
        do_sample: bool = True,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float = 1.0,
        freq_penalty: float = 0.0,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        return_type: Literal["input", "str", "tokens"] = "input",
        verbose: bool = True,
        attention_mask: Tensor | None = None,
        initial_state: ModelState | None = None,
        generator: torch.Generator | None = None,
        num_beams: int = 1,
        length_penalty: float = 1.0,
    ) -> Any:
        """Continue a prompt. Hooks fire once for the prompt and once for every new token but the last.

        Here `hook_h.{t}` with t >= 0 counts from the prompt's first column and fires in the one call that holds that
        column; a negative t counts from the end of each call, so `hook_h.-1` fires every time.

        Parameters
        ----------
        input
            Text, a list of texts, or token ids b l; "" starts from the BOS token.
        max_new_tokens
            Tokens to add.
        stop_at_eos, eos_token_id
            End a row at any of these (default: the tokenizer's and all that the config names); the rest is filled with
            the first of them.
        do_sample, top_k, top_p, temperature, freq_penalty
            False takes the likeliest token; the others as in :func:`sample_logits`. Rows of the vocabulary that the
            tokenizer does not know are never drawn.
        prepend_bos, padding_side, attention_mask
            As in `forward`.
        return_type
            "input": as the input was; "str" or "tokens".
        verbose
            Show a progress bar.
        initial_state
            Memory to continue from.
        generator
            Source of randomness; default: torch's global one.
        num_beams, length_penalty
            With more than one beam, and `do_sample=False`: the likeliest of the continuations that the beams find; see
            :mod:`hooked_mamba.model.beam_search`.

        Returns
        -------
        str, list or Tensor
            Prompt and continuation: a string, a list of strings, or tokens b l+new. Padding is left out of strings.
        """
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be 0 or more, got {max_new_tokens}")
        if return_type not in ("input", "str", "tokens"):
            raise ValueError(f"return_type must be 'input', 'str' or 'tokens', got {return_type!r}")
        if num_beams < 1 or (num_beams > 1 and do_sample):
            raise ValueError(f"num_beams={num_beams}: expected 1 or more, and more than 1 with do_sample=False")
        one_text = isinstance(input, str)
        if one_text and not input:
            prepend_bos = True
        tokens, found_mask = self.input_to_tokens(input, prepend_bos, padding_side)  # type: ignore[attr-defined]
        given = attention_mask if attention_mask is not None else found_mask
        padding = None if given is None else Padding.from_mask(given, tokens.shape, tokens.device)
        mask = None if padding is None else padding.mask.long()
        stops = self._stop_tokens(eos_token_id) if stop_at_eos else []
        last = _last_real(tokens, mask)

        real = mask if mask is not None else torch.ones_like(tokens)
        made: list[Tensor] = []
        ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        bar = tqdm(total=max_new_tokens, disable=not verbose, desc="tokens", leave=False)
        with bar, self._counting_columns(num_beams > 1) as columns:
            step, state = tokens, initial_state
            if num_beams > 1 and max_new_tokens:
                rules = Rules(num_beams, max_new_tokens, stops, length_penalty)
                made = self._by_beams(tokens, padding, last, initial_state, rules, columns)
            while num_beams == 1 and len(made) < max_new_tokens and not ended.all():
                logits, state = self(  # type: ignore[operator]
                    step, attention_mask=None if made else padding, initial_state=state, return_state=True
                )
                columns(step.shape[1])
                row = logits[:, -1] if made else logits[torch.arange(len(tokens)), last]
                row = row.to(tokens.device, copy=True)
                row[:, self.d_vocab_real :] = -torch.inf  # type: ignore[attr-defined]
                seen = seen_mask = None
                if freq_penalty:  # the whole text so far, rebuilt at every step: only where somebody counts it
                    seen = torch.cat([tokens, *(t[:, None] for t in made)], 1)
                    seen_mask = torch.nn.functional.pad(real, (0, len(made)), value=1)
                heat = temperature if do_sample else 0.0
                new = sample_logits(row, top_k, top_p, heat, freq_penalty, seen, seen_mask, generator)
                if stops:
                    new = torch.where(ended, stops[0], new)
                    ended |= torch.isin(new, torch.tensor(stops, device=new.device))
                made.append(new)
                step = new[:, None]
                bar.update()

        added = torch.stack(made, 1) if made else tokens[:, :0]
        is_text = one_text or (not isinstance(input, Tensor) and all(isinstance(part, str) for part in input))
        if return_type == "tokens" or (return_type == "input" and not is_text):
            return torch.cat([tokens, added], 1)
        texts = [self._text(*row, stops) for row in zip(tokens, real, added, strict=True)]
        return texts[0] if len(texts) == 1 and not (is_text and not one_text) else texts

    def _by_beams(
        self,
        tokens: Tensor,
        padding: Padding | None,
        last: Tensor,
        state: ModelState | None,
        rules: Rules,
        columns: Callable[[int], None],
    ) -> list[Tensor]:
        """New tokens of all rows, one tensor per position; rows that end earlier are filled with the first end
        token."""

        def read(new: Tensor, state: ModelState | None, padding: Padding | None = None) -> tuple[Tensor, ModelState]:
            logits, state = self(new, attention_mask=padding, initial_state=state, return_state=True)  # type: ignore[operator]
            columns(new.shape[1])
            rows = (
                logits[:, -1] if len(logits) != len(last) or padding is None else logits[torch.arange(len(new)), last]
            )
            rows = rows.to(tokens.device, copy=True)
            rows[:, self.d_vocab_real :] = -torch.inf  # type: ignore[attr-defined]
            return rows, state

        logits, after = read(tokens, state, padding)
        found = beam_search(read, logits, after, rules)
        length = max(map(len, found))
        filled = [text + [rules.stops[0] if rules.stops else 0] * (length - len(text)) for text in found]
        return list(torch.tensor(filled, device=tokens.device).unbind(1))

    def _text(self, prompt: Tensor, mask: Tensor, added: Tensor, stops: list[int]) -> str:
        new = added.tolist()
        ends = [i for i, token in enumerate(new) if token in stops]
        ids = prompt[mask.bool()].tolist() + (new[: ends[0]] if ends else new)
        return self.to_string(torch.tensor(ids, dtype=torch.long))  # type: ignore[attr-defined]

    def _stop_tokens(self, eos_token_id: int | Sequence[int] | None) -> list[int]:
        if eos_token_id is None:
            return list(self.eos_token_ids)  # type: ignore[attr-defined]
        return [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)

    @contextmanager
    def _counting_columns(self, rows_move: bool) -> Iterator[Any]:
        """Say on the model and on single-state hook points how many columns earlier calls had; gives a function that
        counts on."""
        sites = [p for p in self.hook_dict.values() if isinstance(p, StateHookPoint)]  # type: ignore[attr-defined]

        def count(columns: int) -> None:
            self.columns_before = (self.columns_before or 0) + columns
            for site in sites:
                site.offset = (site.offset or 0) + columns

        count(0)
        self.rows_move = rows_move
        try:
            yield count
        finally:
            self.columns_before, self.rows_move = None, False
            for site in sites:
                site.offset = None


def _last_real(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Column of each row's last real token."""
    length = tokens.shape[1]
    if mask is None:
        return torch.full((len(tokens),), length - 1, device=tokens.device)
    columns = torch.arange(length, device=tokens.device)
    return (columns * mask).max(1).values
