"""What the tour measures. No drawing here: read this file to see how the hooks are used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_mamba import HookedMamba, HookedMamba2, HookPoint, Mamba2Config, loading
from hooked_mamba.activation_cache import ActivationCache
from hooked_mamba.hooks.names import split_state_point

Model = HookedMamba | HookedMamba2

CHANNELS = 8
"""Channels of each layer that are silenced."""
SHOWN_LAYERS = 4
"""Layers of each kind of intervention in the summary."""


@dataclass(frozen=True)
class Prediction:
    """One candidate for the next token."""

    token: str
    probability: float
    logit: float


@dataclass(frozen=True)
class SiteValue:
    """One hook site as this run saw it."""

    name: str
    shape: tuple[int, ...]
    meaning: str


@dataclass(frozen=True)
class Effects:
    """What each of many interventions does to the predicted token. Rows are layers."""

    log_probability: Float[Tensor, "layer n"]
    """Change of the predicted token's log-probability, in nats: -0.69 halves the probability."""
    probability: Float[Tensor, "layer n"]
    """Its probability afterwards."""


@dataclass(frozen=True)
class Outcome:
    """One intervention in words, and what the model predicts then."""

    what: str
    probability: float
    """Of the token predicted before."""
    logit: float
    top: Prediction
    """What is predicted now."""


@dataclass(frozen=True)
class Tour:
    """Everything the terminal and the page show."""

    model_name: str
    summary: str
    prompt: str
    tokens: list[str]
    predictions: list[Prediction]
    sites: list[SiteValue]
    n_sites: int
    state_norm: Float[Tensor, "layer l"]
    dt: Float[Tensor, "layer l"]
    wiped: Effects
    """Column t: the layer's state set to zero right after position t; a last row has all layers' states wiped."""
    channels: Int[Tensor, "layer k"]
    """The strongest channels of each layer, by direct effect."""
    direct: Float[Tensor, "layer k"]
    """Their direct effects."""
    silenced: Effects
    """Column j: channel `channels[:, j]` set to zero at every position."""
    outcomes: list[Outcome]
    continuation: str
    wiped_layer: int
    wiped_position: int
    wiped_continuation: str
    """The continuation when that one state is wiped."""


def load(name: str) -> Model:
    """A model of either family, by bundled name, folder or hub id."""
    family = loading.load_checkpoint(name).family
    return (HookedMamba2 if family == "mamba2" else HookedMamba).from_pretrained(name)


@torch.no_grad()
def take_tour(model: Model, prompt: str, channels: int = CHANNELS) -> Tour:
    """Run the prompt once to read, and once per layer for each kind of edit.

    1. Read the default sites, the states of all layers, and the other large sites of the first layer.
    2. The last position's likeliest token is the answer whose log-probability every edit is judged by.
    3. Wipe the state of one layer after one position, for each of both (`hook_h.{t}`, so the loss is carried forward).
    4. Rank each layer's channels by direct effect on the answer and silence the strongest, one by one and together.
    5. Continue the prompt, also with the state wiped that mattered most.
    """
    tokens = model.to_tokens(prompt)
    n_layers = model.cfg.n_layers
    logits, cache = model.run_with_cache(tokens, names_filter=names_to_read(model))
    before = logits[0, -1, : model.d_vocab_real]
    answer = int(before.argmax())

    wiped = [wipe_states(model, tokens, [layer]) for layer in range(n_layers)]
    wiped.append(wipe_states(model, tokens, range(n_layers)))
    direct = direct_effects(model, cache, answer)
    strongest = direct.abs().topk(min(channels, direct.shape[1])).indices
    silenced = [silence_each(model, tokens, layer, strongest[layer]) for layer in range(n_layers)]
    together = [silence_together(model, tokens, {layer: strongest[layer]}) for layer in range(n_layers)]
    everywhere = silence_together(model, tokens, dict(enumerate(strongest)))

    wiped_effects = effects(wiped, before, answer)
    worst = wiped_effects.log_probability.argmin(1).tolist()
    words = model.to_str_tokens(tokens)
    count = f"the {strongest.shape[1]} strongest channels"
    owners = [*(f"layer {i}'s state" for i in range(n_layers)), "every layer's state"]
    wipings = [
        outcome(model, f"wipe {owner} after {words[t]!r} ({t})", after[t], answer)
        for owner, t, after in zip(owners, worst, wiped, strict=True)
    ]
    silencings = [
        outcome(model, f"silence {count} of layer {layer}", after, answer) for layer, after in enumerate(together)
    ]
    layer = int(wiped_effects.log_probability[:-1].amin(1).argmin())
    return Tour(
        model_name=model.cfg.model_name,
        summary=summarize(model),
        prompt=prompt,
        tokens=words,
        predictions=top_predictions(model, before),
        sites=site_values(cache),
        n_sites=len(model.hook_dict),
        state_norm=torch.stack([cache["h", i][0].flatten(1).norm(dim=1) for i in range(n_layers)]),
        dt=cache.stack_activation("dt")[:, 0].mean(-1),
        wiped=wiped_effects,
        channels=strongest,
        direct=direct.gather(1, strongest),
        silenced=effects(silenced, before, answer),
        outcomes=[
            outcome(model, "nothing changed", before, answer),
            *strongest_outcomes(wipings[:-1]),
            wipings[-1],
            *strongest_outcomes(silencings),
            outcome(model, f"silence {count} of every layer", everywhere, answer),
        ],
        continuation=continue_prompt(model, tokens),
        wiped_layer=layer,
        wiped_position=worst[layer],
        wiped_continuation=continue_prompt(model, tokens, f"blocks.{layer}.mixer.hook_h.{worst[layer]}"),
    )


# Reading -----------------------------------------------------------------------------------------------------------


def names_to_read(model: Model) -> list[str]:
    """The default sites, every layer's states, and the first layer's other sites that are computed on demand."""
    first = [name for name in model.hook_dict if name.startswith("blocks.0.")]
    return [*model.default_names(), *first, "blocks.*.mixer.hook_h", "blocks.0.mixer.hook_h.-1"]


def site_values(cache: ActivationCache) -> list[SiteValue]:
    """The sites around and inside the first block, with their shapes."""
    names = list(cache)
    shown = [name for name in names if name.startswith("blocks.0.") or not name.startswith("blocks.")]
    single = {name: state[0] for name in names if (state := split_state_point(name))}  # to stand beside its site
    shown.sort(key=lambda name: (names.index(single.get(name, name)), name in single))
    return [SiteValue(name, tuple(cache[name].shape), cache.text(name)) for name in shown]


def top_predictions(model: Model, logits: Float[Tensor, " v"], k: int = 8) -> list[Prediction]:
    """The k likeliest next tokens."""
    probabilities = logits.softmax(-1)
    best = probabilities.topk(min(k, len(logits))).indices.tolist()
    return [Prediction(model.to_single_str_token(i), float(probabilities[i]), float(logits[i])) for i in best]


def summarize(model: Model) -> str:
    """Size and shape of a model in one line."""
    cfg, millions = model.cfg, sum(p.numel() for p in model.parameters()) / 1e6
    inner = f"{cfg.H} heads of {cfg.P} channels" if isinstance(cfg, Mamba2Config) else f"{cfg.E} channels"
    family = "Mamba-2" if isinstance(cfg, Mamba2Config) else "Mamba"
    return f"{family}, {cfg.n_layers} layers, {inner}, {cfg.d_state} state entries each, {millions:.1f} M parameters"


# Editing -----------------------------------------------------------------------------------------------------------


def wipe_states(model: Model, tokens: Int[Tensor, "1 l"], layers: Iterable[int]) -> Float[Tensor, "l v"]:
    """Final logits when these layers' states are zeroed right after position t, for every t: row t of one batch."""
    length = tokens.shape[1]

    def wipe_row(t: int) -> Callable[[Tensor, HookPoint], Tensor]:
        def wipe(h: Tensor, hook: HookPoint) -> Tensor:
            h[t] = 0
            return h

        return wipe

    hooks = [(f"blocks.{i}.mixer.hook_h.{t}", wipe_row(t)) for i in layers for t in range(length)]
    return model.run_with_hooks(tokens.expand(length, -1), fwd_hooks=hooks)[:, -1, : model.d_vocab_real]


def out_proj_input(model: Model, layer: int) -> str:
    """The site that out_proj reads: Mamba-2 has a norm of its own after the gate."""
    return f"blocks.{layer}.mixer." + ("norm.hook_out" if isinstance(model, HookedMamba2) else "hook_y_gated")


def direct_effects(model: Model, cache: ActivationCache, answer: int) -> Float[Tensor, "layer E"]:
    """How far each channel at the last position lifts the answer's logit above the average logit, by itself.

    The channel's value times its row of out_proj is what it adds to the residual stream; the final norm's divisor is
    held at what it was.
    """
    readout = model.W_U[:, answer] - model.W_U[:, : model.d_vocab_real].mean(1)
    readout = readout * model.ln_final.weight / cache["scale"][0, -1]
    values = torch.stack([cache[out_proj_input(model, i)][0, -1] for i in range(model.cfg.n_layers)])
    return values * (model.W_out @ readout)


def silence_each(
    model: Model, tokens: Int[Tensor, "1 l"], layer: int, channels: Int[Tensor, " k"]
) -> Float[Tensor, "k v"]:
    """Final logits when one channel is zero at every position, for each: row j of one batch."""
    rows = torch.arange(len(channels))

    def silence(y: Tensor, hook: HookPoint) -> Tensor:
        y[rows, :, channels] = 0
        return y

    logits = model.run_with_hooks(tokens.expand(len(channels), -1), fwd_hooks=[(out_proj_input(model, layer), silence)])
    return logits[:, -1, : model.d_vocab_real]


def silence_together(
    model: Model, tokens: Int[Tensor, "1 l"], channels: dict[int, Int[Tensor, " k"]]
) -> Float[Tensor, " v"]:
    """Final logits when all these channels, by layer, are zero at every position."""

    def silence(y: Tensor, hook: HookPoint) -> Tensor:
        y[:, :, channels[hook.layer()]] = 0
        return y

    hooks = [(out_proj_input(model, layer), silence) for layer in channels]
    return model.run_with_hooks(tokens, fwd_hooks=hooks)[0, -1, : model.d_vocab_real]


def continue_prompt(model: Model, tokens: Int[Tensor, "1 l"], wipe: str | None = None) -> str:
    """The likeliest continuation up to the end of the story, with the state at the hook point `wipe` zeroed."""

    def zero(h: Tensor, hook: HookPoint) -> Tensor:
        return torch.zeros_like(h)

    with model.hooks(fwd_hooks=[(wipe, zero)] if wipe else []):
        text = model.generate(tokens, max_new_tokens=24, do_sample=False, verbose=False, return_type="str")
    return text.removeprefix(str(model.to_string(tokens[0])))


# Judging -----------------------------------------------------------------------------------------------------------


def effects(after: Sequence[Float[Tensor, "n v"]], before: Float[Tensor, " v"], answer: int) -> Effects:
    """Log-probability and probability of the answer after each edit."""
    log_probability = torch.stack(list(after)).log_softmax(-1)[..., answer]
    return Effects(log_probability - before.log_softmax(-1)[answer], log_probability.exp())


def outcome(model: Model, what: str, after: Float[Tensor, " v"], answer: int) -> Outcome:
    """What the model predicts after an edit."""
    probability = float(after.softmax(-1)[answer])
    return Outcome(what, probability, float(after[answer]), top_predictions(model, after, 1)[0])


def strongest_outcomes(outcomes: list[Outcome]) -> list[Outcome]:
    """Those that lower the answer the most, in order of layers."""
    chosen = sorted(outcomes, key=lambda o: o.probability)[:SHOWN_LAYERS]
    return [o for o in outcomes if o in chosen]
