"""Training in one call: coders, text and options in, trained coders out."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hooked_mamba.durable import write_file
from hooked_mamba.model_hash import model_hash
from hooked_mamba.models import HookedModel, load_model
from hooked_mamba.names_elsewhere import SAE_LENS, knows_options
from saes.coder import SAE, MambaCoder, SparseCoder
from saes.config import NEEDS_K, CoderConfig
from saes.located import locate
from saes.naming import unique_name
from saes.options import OptionError, check_keys, check_number, from_mapping, near, read_file
from saes.renamed import warn_renamed
from saes.run_options import RUN
from saes.saelens_names import OPTIONS
from saes.store.data import DataConfig, Text, make_store
from saes.store.documents import read_text_file
from saes.targets import all_streams, input_of, taps_of
from saes.training.config import TrainConfig
from saes.training.loop import TrainResult, check_folder
from saes.training.trainer import Trainer
from saes.training.world import World, local_device, torchrun

SPEC = (
    "name", "site", "layer", "architecture", "d_sae", "k", "reads", "target", "window", "skip", "input_norm", "widths",
)  # fmt: skip
"""Keys of a coder in short form, see :func:`coder_config`."""


def coder_config(
    model: HookedModel, spec: Mapping[str, Any], channels: Mapping[str, Sequence[int]] | None = None
) -> CoderConfig:
    """A coder's config from a short form; widths, name and hash come from the model.

    Parameters
    ----------
    model
        On whose activations it will be trained.
    spec
        An SAE where it has "site": a full name, or a short one ("x", "out_proj") with "layer". A MambaCoder where
        it has only "layer", with "reads" and "target". With "window", a number of positions or "taps" (as many as the
        branch's convolution or token shift reads), a transcoder to the site, or to the block's output, that reads the
        branch's normalised inputs at so many positions. "d_sae" is required. "architecture" is "topk" by default for
        an SAE and "batchtopk" for a MambaCoder, "k" 32, "input_norm" "scale"; "skip", and "widths" of a matryoshka.
    channels
        Site -> the channels of it that are kept, as in `DataConfig`.

    Raises
    ------
    OptionError
        For unknown keys, or neither site nor layer.
    HookNameError
        If the site does not exist.
    """
    check_keys("a coder", spec, SPEC, ["d_sae"])
    layer, site = spec.get("layer"), spec.get("site")
    if layer is not None and not -model.cfg.n_layers <= layer < model.cfg.n_layers:
        raise OptionError(f"layer {layer} is out of range: the model has {model.cfg.n_layers}")
    fields: dict[str, Any] = {}
    window = spec.get("window")
    if site is not None:
        read = predicted = model.act_name(site, layer)
        for key in ("reads", "target"):
            if key in spec:
                raise OptionError(f'"{key}" is for MambaCoders, which have no "site"')
        if window is not None:
            read = input_of(model, predicted)
            fields = {"reads": "normalized", "target": "block"}
    elif layer is not None:
        reads = spec.get("reads", "normalized")
        sites = {"normalized": "norm.hook_out", "resid": "hook_resid_pre"}
        if reads not in sites:
            raise OptionError(f"reads must be 'normalized' or 'resid', got {reads!r}{near(str(reads), list(sites))}")
        block = f"blocks.{layer % model.cfg.n_layers}."
        read, predicted = block + sites[reads], f"{block}mixer.{model.mixer(layer % model.cfg.n_layers).out_site}"
        fields = {"reads": reads, "target": spec.get("target", "block")}
    else:
        raise OptionError('a coder needs a "site" (SAE) or a "layer" (MambaCoder)')
    if window is not None:
        fields["window"] = window = taps_of(model, predicted) if window == "taps" else window
        check_number("window", window, 1, whole=True)
    architecture = spec.get("architecture", "topk" if site is not None else "batchtopk")
    widths, kept = spec.get("widths"), channels or {}
    return CoderConfig(
        architecture=architecture,
        in_site=read,
        out_site=predicted,
        d_in=locate(read, model, kept.get(read)).width * (window or 1),
        d_out=locate(predicted, model, kept.get(predicted)).width,
        d_sae=spec["d_sae"],
        k=spec.get("k", 32) if architecture in NEEDS_K else None,
        skip=spec.get("skip", False),
        input_norm=spec.get("input_norm", "scale"),
        matryoshka_widths=None if widths is None else tuple(widths),
        model_name=model.cfg.model_name,
        model_hash=model_hash(model),
        **fields,
    )


def train_coders(
    model: HookedModel,
    coders: Mapping[str, CoderConfig] | Sequence[CoderConfig],
    text: Text,
    config: TrainConfig,
    data: DataConfig | None = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    loggers: Sequence[str] = (),
) -> TrainResult:
    """Train coders on a model's activations, all of them on the same forward passes.

    Parameters
    ----------
    model
        Not changed. Coders are trained on its device; under torchrun gradients are averaged over processes.
    coders
        By name, or a list: names are then made from the sites.
    text
        A file, texts, tokens or a data set; see `saes.store.data`.
    config, data
        How to train, and how text becomes batches.
    out
        Folder of checkpoints, log and finished coders; None: nothing is written.
    resume
        Continue from the last checkpoint in `out`, if there is one.
    loggers
        "tensorboard", "wandb".
    """
    named = coders if isinstance(coders, Mapping) else _named(coders)
    data = data or DataConfig(seed=config.seed)
    with torchrun(model.device):
        world = World.current()
        store = make_store(model, all_streams(named.values()), text, data, rank=world.rank, world=world.size)
        built = {name: _build(cfg, config.seed + i).to(model.device) for i, (name, cfg) in enumerate(named.items())}
        about: dict[str, Any] = {**_named_text(text), "context_length": data.context_length}
        return Trainer(built, store, config, out=out, loggers=loggers, about=about).train(resume=resume)


def _named_text(text: Text) -> dict[str, str]:
    """A file's name; other texts have none."""
    return {"text": Path(text).name} if isinstance(text, str | Path) else {}


def _named(coders: Sequence[CoderConfig]) -> dict[str, CoderConfig]:
    named: dict[str, CoderConfig] = {}
    for cfg in coders:
        named[unique_name(cfg, named)] = cfg
    return named


def _build(cfg: CoderConfig, seed: int) -> SparseCoder:
    return (SAE if cfg.is_sae else MambaCoder)(cfg, seed=seed)


@knows_options(OPTIONS, {}, SAE_LENS, OptionError)
def train_sae(
    model: HookedModel,
    hook_site: str,
    layer: int | None = None,
    architecture: str | None = None,
    d_sae: int = 4096,
    n_tokens: int | None = None,
    *,
    text: Text,
    **options: Any,
) -> SparseCoder:
    """Train one SAE.

    Parameters
    ----------
    model
        Whose activations are read.
    hook_site, layer
        A site's short name ("out_proj", "x", "dt") and its block, or a full name.
    architecture, d_sae
        One of `saes.config.ARCHITECTURES`, by default "topk", and the number of latents.
    n_tokens
        Positions to train on; default: a million, unless `steps` is given.
    text
        A file, texts, tokens or a data set.
    options
        Any field of a coder in short form (`k`, `skip`, ...), of `TrainConfig` and of `DataConfig`, and `out`,
        `resume`, `loggers` of :func:`train_coders`. Unknown ones are errors.
    """
    if "variant" in options:
        if architecture is not None:
            raise OptionError("architecture and variant are the same: give architecture alone")
        warn_renamed("train_sae(variant=...)", "architecture=")
        architecture = options.pop("variant")
    site = {"out_proj_out": "out_proj"}.get(hook_site, hook_site)  # as recurrentlens has it
    spec, train, data, call = split_options(options)
    spec = {"site": site, "layer": layer, "architecture": architecture or "topk", "d_sae": d_sae, **spec}
    if n_tokens is None and train.get("steps") is None:
        n_tokens = 1_000_000
    config = TrainConfig.from_dict({**train, "n_tokens": n_tokens})
    data_config = DataConfig.from_dict({"seed": config.seed, **data})
    cfg = coder_config(model, {k: v for k, v in spec.items() if v is not None}, data_config.channels)
    result = train_coders(model, [cfg], text, config, data_config, **call)
    return next(iter(result.coders.values()))


def split_options(options: Mapping[str, Any]) -> tuple[dict, dict, dict, dict]:
    """Options grouped by where they belong: a coder's short form, TrainConfig, DataConfig, `train_coders` itself.

    Raises
    ------
    OptionError
        For an option that none of them has.
    """
    groups = [
        [key for key in SPEC if key not in ("site", "layer", "architecture", "d_sae", "name")],
        [key for key in TrainConfig.__dataclass_fields__ if key != "n_tokens"],
        [key for key in DataConfig.__dataclass_fields__ if key != "seed"],
        ["out", "resume", "loggers"],
    ]
    check_keys("train_sae", options, sorted({key for group in groups for key in group}))
    spec, train, data, call = ({key: options[key] for key in group if key in options} for group in groups)
    return spec, train, data, call


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole training from a file."""

    model: str
    """A bundled name, a folder or a hub id."""
    text: str
    """Path of a text file."""
    out: str
    """Folder of checkpoints, log and finished coders."""
    coders: tuple[Mapping[str, Any], ...]
    """Each in short form, see :func:`coder_config`; "name" names it."""
    train: Mapping[str, Any]
    """Options of `TrainConfig`."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Options of `DataConfig`."""
    device: str = "cpu"
    loggers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.coders:
            raise OptionError("coders is empty: there is nothing to train")
        for spec in self.coders:
            check_keys("a coder", spec, SPEC, ["d_sae"])
        TrainConfig.from_dict(self.train)
        DataConfig.from_dict(self.data)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """From a plain mapping; an unknown key, at any depth, is an error that names the nearest option."""
        return from_mapping(cls, values)

    def to_dict(self) -> dict[str, Any]:
        """A plain mapping, fit for JSON, from which the same run can be continued from any folder."""
        places = {name: _absolute(getattr(self, name)) for name in ("model", "text", "out")}
        return {**dataclasses.asdict(self), **places}

    @classmethod
    def from_file(cls, path: str | Path) -> RunConfig:
        """From a JSON or TOML file."""
        return cls.from_dict(read_file(path))


def _absolute(place: str) -> str:
    """The full path of what is on this machine; names of models stay as they are."""
    path = Path(place).expanduser()
    return str(path.resolve()) if path.exists() else place


def run(config: RunConfig, *, resume: bool = False) -> TrainResult:
    """Load the model, train the coders, write them, and beside them the config itself, `out`/run.json."""
    out = Path(config.out).expanduser()
    check_folder(out, resume)
    if not Path(config.text).expanduser().is_file():
        read_text_file(config.text)  # which says what is wrong
    model = load_model(config.model).to(local_device(config.device))
    data = DataConfig.from_dict(config.data)
    named: dict[str, CoderConfig] = {}
    given = [spec["name"] for spec in config.coders if spec.get("name")]
    for spec in config.coders:
        cfg = coder_config(model, spec, data.channels)
        name = spec.get("name") or unique_name(cfg, {*named, *given})
        if name in named:
            raise OptionError(f'two coders are called {name}: give each a "name" of its own')
        named[name] = cfg
    if int(os.environ.get("RANK", "0")) == 0:
        out.mkdir(parents=True, exist_ok=True)
        write_file(out / RUN, (json.dumps(config.to_dict(), indent=2) + "\n").encode())
    return train_coders(
        model,
        named,
        config.text,
        TrainConfig.from_dict(config.train),
        data,
        out=out,
        resume=resume,
        loggers=config.loggers,
    )
