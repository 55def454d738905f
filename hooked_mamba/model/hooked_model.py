"""HookedModel: a language model of any blocks with hooks, text, generation, and checkpoints both ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooked_mamba import loading
from hooked_mamba.activation_cache import ActivationCache
from hooked_mamba.config import ModelConfig
from hooked_mamba.display import model_html
from hooked_mamba.documents import Documents
from hooked_mamba.hooks.points import HookPoint
from hooked_mamba.hooks.positions import PositionSelect
from hooked_mamba.hooks.root import HookedRoot
from hooked_mamba.hooks.site_name import SiteName
from hooked_mamba.loading.tokenizer import load_tokenizer, save_tokenizer
from hooked_mamba.memory import check_cache_fits, keep_freed_memory
from hooked_mamba.mixers.base import Branch
from hooked_mamba.model.device_map import DeviceMap, placed, plan
from hooked_mamba.model.generation import Generation
from hooked_mamba.model.inputs import Inputs
from hooked_mamba.model.stack import Block, Stack, Stages
from hooked_mamba.model.text import PaddingSide, TextMethods, lm_cross_entropy_loss
from hooked_mamba.names_elsewhere import knows_options
from hooked_mamba.state import ModelState, Padding
from hooked_mamba.transformerlens_names import GRANTED, OPTIONS
from hooked_mamba.weights import SharedWeights

ReturnType = Literal["logits", "loss", "both"] | None

Model = TypeVar("Model", bound="HookedModel")
"""The class that a constructor was called on. (A runtime checker of annotations cannot read `Self`.)"""


class Output(NamedTuple):
    """What `return_type="both"` gives."""

    logits: Tensor
    loss: Tensor


class HookedModel(TextMethods, Inputs, Generation, SharedWeights, HookedRoot, Stack):
    """A language model with every internal site readable and writable.

    A subclass names its config and the branches of its blocks (`branch_classes`), and for blocks with more than one
    mixer also :meth:`stages`.
    """

    cfg: Any
    family: ClassVar[str]
    """What checkpoints and tables call it; the key of :data:`MODELS`."""
    config_class: ClassVar[type[ModelConfig]]
    branch_classes: ClassVar[Mapping[str, type[Branch]]]
    """Name of a branch in its block -> its class."""
    cache_class = ActivationCache

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "family" in cls.__dict__:
            MODELS[cls.family] = cls

    def __init__(self, cfg: ModelConfig, tokenizer: Any = None, *, seed: int | None = None) -> None:
        """A model with random weights, reproducible with `seed`. For trained weights: `from_pretrained`."""
        self._build(cfg, tokenizer)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        self.reset_parameters(generator)

    def _build(self, cfg: ModelConfig, tokenizer: Any) -> None:
        if not isinstance(cfg, self.config_class):
            raise TypeError(f"{type(self).__name__} takes a {self.config_class.__name__}, got {type(cfg).__name__}")
        super().__init__(cfg, [self.make_block(cfg, i) for i in range(cfg.n_layers)])
        self.tokenizer = tokenizer
        self.setup()
        keep_freed_memory()

    @classmethod
    def stages(cls, cfg: Any, layer: int) -> Stages:
        """The stages of a block, each one norm and the branches that read it."""
        return (tuple(cls.branch_classes),)

    @classmethod
    def make_block(cls, cfg: Any, layer: int) -> Block:
        """One block with its branches."""
        stages = cls.stages(cfg, layer)
        return Block(
            cfg,
            {name: cls.branch_classes[name](cfg, layer) for stage in stages for name in stage},
            stages,
            norm=cls.norm_class,
        )

    # Making and keeping --------------------------------------------------------------------------------------

    @classmethod
    def from_config(cls: type[Model], cfg: ModelConfig, tokenizer: Any = None, *, seed: int | None = None) -> Model:
        """A model with random weights."""
        return cls(cfg, tokenizer, seed=seed)

    @classmethod
    @knows_options(OPTIONS, GRANTED)
    def from_pretrained(
        cls: type[Model],
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        dtype: torch.dtype | str | None = None,
        device: str | torch.device | None = None,
        tokenizer: Any = None,
        device_map: DeviceMap | None = None,
        adapter: str | Path | Sequence[str | Path] | None = None,
    ) -> Model:
        """Load trained weights.

        Parameters
        ----------
        name_or_path
            A bundled model ("tinystories-4l"), a local folder, a `.pth` file of RWKV, a `.gguf` file, or a Hugging Face
            hub id. The format (transformers'; state-spaces', RWKV's and Codestral's own; GGUF, MLX) is found from the
            files.
        revision
            Branch, tag or commit on the hub.
        dtype
            Weights' precision; default float32. A, D and dt's bias stay float32 in half precision.
        device
            Default: the CPU.
        tokenizer
            An object, a local path or a hub id; default: the folder's own where it has one.
        device_map
            Instead of one device: "auto" fills the GPUs and then the CPU by free memory; a mapping says where
            "embed", "blocks.0", ..., "ln_final" and "unembed" go (see :mod:`hooked_mamba.model.device_map`).
        adapter
            A folder or hub id of PEFT's with a LoRA of this checkpoint, or several: each is merged into the weights.
        """
        checkpoint = loading.load_checkpoint(name_or_path, family=cls.family, revision=revision, adapter=adapter)
        return cls.from_checkpoint(checkpoint, dtype=dtype, device=device, tokenizer=tokenizer, device_map=device_map)

    from_pretrained_no_processing = from_pretrained
    """TransformerLens' name: nothing is ever processed here."""

    @classmethod
    def from_checkpoint(
        cls: type[Model],
        checkpoint: loading.Checkpoint,
        *,
        dtype: torch.dtype | str | None = None,
        device: str | torch.device | None = None,
        tokenizer: Any = None,
        device_map: DeviceMap | None = None,
    ) -> Model:
        """The model of an opened checkpoint; arguments as in :meth:`from_pretrained`."""
        if device is not None and device_map is not None:
            raise ValueError(f"give device={device!r} or device_map, not both")
        model, wanted = cls.empty(checkpoint.cfg), as_dtype(dtype) or torch.float32
        planned = None if device_map is None else plan(model, device_map, wanted)
        loading.load_into(model, checkpoint.state_dict, dtype=wanted, device=placed(planned, device or "cpu"))
        model.tie_weights()
        model.tokenizer = load_tokenizer(
            tokenizer, checkpoint.folder, checkpoint.find_tokenizer() if tokenizer is None else None
        )
        return model.eval()

    @classmethod
    def from_hf(cls: type[Model], hf_model: nn.Module, tokenizer: Any = None) -> Model:
        """A copy of a transformers model (MambaForCausalLM, FalconMambaForCausalLM, Mamba2ForCausalLM)."""
        cfg, state_dict = loading.from_hf_model(hf_model, family=cls.family)
        model = cls.empty(cfg)
        reference = next(hf_model.parameters())
        loading.load_into(model, state_dict, dtype=reference.dtype, device=reference.device)
        model.tie_weights()
        model.tokenizer = tokenizer
        return model.eval()

    @classmethod
    def empty(cls: type[Model], cfg: ModelConfig) -> Model:
        """A model whose weights are not allocated yet."""
        model = cls.__new__(cls)
        with torch.device("meta"):
            model._build(cfg, None)
        return model

    def to_hf(self) -> nn.Module:
        """A transformers model with equal logits."""
        return loading.to_hf_model(self.cfg, self.state_dict_for_files()).eval()

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        format: Literal["hf", "raw"] = "hf",
        dtype: torch.dtype | str | None = None,
    ) -> None:
        """Write config, weights and tokenizer; a crash leaves no half-written checkpoint.

        Parameters
        ----------
        folder
            Made if need be.
        format
            "hf" (safetensors) is read by transformers (RWKV-7: by fla), "raw" by the authors' own code (mamba_ssm's
            pytorch_model.bin, RWKV's one .pth file); both by `from_pretrained`.
        dtype
            Precision on disk; default: unchanged.
        """
        loading.save_checkpoint(
            folder,
            self.cfg,
            self.state_dict_for_files(),
            format=format,
            dtype=as_dtype(dtype),
            also=partial(save_tokenizer, self.tokenizer) if self.tokenizer is not None else None,
            float32=loading.float32_names(self),
        )

    def set_tokenizer(self, tokenizer: Any, default_padding_side: PaddingSide = "right") -> None:
        """Use another tokenizer: an object, a local path or a hub id.

        Raises
        ------
        TypeError
            It is no tokenizer.
        ValueError
            Unknown side.
        """
        if default_padding_side not in ("left", "right"):
            raise ValueError(f"default_padding_side must be 'left' or 'right', got {default_padding_side!r}")
        found = load_tokenizer(tokenizer, None)
        if not (callable(found) and hasattr(found, "decode")):
            raise TypeError(f"expected a tokenizer that encodes when called and decodes, got {type(found).__name__}")
        self.tokenizer, self.default_padding_side = found, default_padding_side

    def state_dict_for_files(self) -> dict[str, Tensor]:
        """Weights by name; shared ones (a tied unembedding) appear only under their first name."""
        first = {name for name, _ in self.named_parameters()} | {name for name, _ in self.named_buffers()}
        return {name: value.detach() for name, value in self.state_dict().items() if name in first}

    # Running -------------------------------------------------------------------------------------------------

    @knows_options(OPTIONS, GRANTED)
    def forward(
        self,
        input: str | Sequence[Any] | Tensor,
        return_type: ReturnType = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        start_at_layer: int | None = None,
        tokens: Int[Tensor, "b l"] | None = None,
        attention_mask: Tensor | Padding | None = None,
        stop_at_layer: int | None = None,
        initial_state: ModelState | None = None,
        return_state: bool = False,
        carry: Mapping[str, Tensor] | None = None,
        document_ids: Tensor | None = None,
    ) -> Any:
        """Run the model.

        Parameters
        ----------
        input
            Text, a list of texts (padded and masked), token ids b l or l (a tensor or lists), or with
            `start_at_layer` the residual stream b l d entering that block.
        return_type
            "logits" b l V, "loss" (mean nats per next token), "both", or None.
        loss_per_token
            Losses b l-1 instead of their mean.
        prepend_bos
            For text: put the BOS token in front. Unlike in TransformerLens, the default leaves this to the tokenizer,
            and these models' tokenizers add none; False prevents every tokenizer from adding one.
        padding_side
            For lists: "right" (default) or "left". With either, each row is computed as if it were alone.
        start_at_layer, stop_at_layer
            Blocks from the first to before the second; negative ones count from the end. With `stop_at_layer` the
            residual stream b l d that would enter that block is returned, whatever `return_type`.
        tokens
            The tokens of a residual input, needed for its loss and by blocks that read the embedding (Zamba).
        attention_mask
            b l, 1 for real tokens and 0 for padding at either end.
        initial_state, return_state
            Memory to continue from, and whether to return (output, memory after the last real token of each row).
        carry
            What layers before `start_at_layer` pass to later ones besides the stream, by name; only for models that
            need it, whose error says what.
        document_ids
            b l integers, for several documents packed into a row (mamba_ssm's `seq_idx`): columns of a row with the
            same id are one document, which is computed at every site as if it were alone; the loss predicts no token
            from another document. The returned state is that of the last document.
        """
        if return_type not in ("logits", "loss", "both", None):
            raise ValueError(f"return_type must be 'logits', 'loss', 'both' or None, got {return_type!r}")
        layers = self.layer_range(start_at_layer, stop_at_layer)
        if start_at_layer is None:
            tokens, found_mask = self.input_to_tokens(input, prepend_bos, padding_side)
            attention_mask = found_mask if attention_mask is None else attention_mask
            batch, length = tokens.shape
        else:
            resid = self.checked_residual(input)
            batch, length, _ = resid.shape
        padding = None
        if attention_mask is not None:
            padding = Padding.from_mask(attention_mask, (batch, length), self.device)
        self.padding = padding
        documents = None
        if document_ids is not None:
            mask = None if padding is None else padding.mask
            documents = Documents.from_ids(document_ids, (batch, length), mask, self.device)
        if initial_state is not None:
            self.check_state(initial_state, batch)

        if start_at_layer is None:
            assert tokens is not None  # found above
            resid = self.embed_tokens(tokens)
        carry = self.carried(carry, resid if start_at_layer is None else None, tokens)
        resid, state = self.run_blocks(resid, layers, initial_state, padding, carry, documents)
        out: Any = resid
        if stop_at_layer is None:
            logits = self.to_logits(resid)
            out = self._output(logits, tokens, padding, return_type, loss_per_token, documents)
        return (out, state) if return_state else out

    def loss_fn(
        self,
        logits: Float[Tensor, "b l v"],
        tokens: Int[Tensor, "b l"],
        attention_mask: Tensor | None = None,
        per_token: bool = False,
        starts: Tensor | None = None,
    ) -> Tensor:
        """Cross-entropy of next tokens in nats, see :func:`lm_cross_entropy_loss`."""
        return lm_cross_entropy_loss(logits, tokens, attention_mask, per_token, starts)

    def _repr_html_(self) -> str:
        return model_html(self)

    # Helpers -------------------------------------------------------------------------------------------------

    def carried(
        self, carry: Mapping[str, Tensor] | None, embedded: Tensor | None, tokens: Tensor | None
    ) -> Mapping[str, Tensor] | None:
        """What every block of a pass may read besides the stream; `embedded` is None if the pass starts at a later
        layer."""
        return carry

    def _output(
        self,
        logits: Tensor,
        tokens: Tensor | None,
        padding: Padding | None,
        return_type: ReturnType,
        loss_per_token: bool,
        documents: Documents | None = None,
    ) -> Any:
        if return_type is None:
            return None
        if return_type == "logits":
            return logits
        if tokens is None:
            raise ValueError("the loss of a residual input needs its tokens: pass tokens=")
        if tokens.shape[1] < 2:
            raise ValueError("the loss needs two tokens or more: with one there is nothing to predict")
        mask = None if padding is None else padding.mask.to(logits.device)
        starts = None if documents is None else documents.starts.to(logits.device)
        loss = self.loss_fn(logits, tokens, mask, loss_per_token, starts)
        return loss if return_type == "loss" else Output(logits, loss)

    def prepared(
        self,
        points: dict[str, HookPoint],
        select: PositionSelect,
        device: str | torch.device | None,
        model_args: tuple[Any, ...],
        model_kwargs: dict[str, Any],
        incl_bwd: bool,
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Text as tokens, so that the forward pass need not tokenise again; MemoryError if the sites cannot fit."""
        input, *rest = model_args if model_args else (model_kwargs.get("input"),)
        if input is None:
            return model_args, model_kwargs
        kwargs = {name: value for name, value in model_kwargs.items() if name != "input"}
        start = kwargs.get("start_at_layer")
        if start is None and not rest:
            asked = (kwargs.pop(name, None) for name in ("prepend_bos", "padding_side"))
            input, mask = self.input_to_tokens(input, *asked)
            if kwargs.get("attention_mask") is None:
                kwargs["attention_mask"] = mask
            shape = input.shape
        elif start is None:
            shape = self.input_to_tokens(input)[0].shape
        else:
            shape = self.checked_residual(input).shape[:2]
        layers = self.layer_range(start, kwargs.get("stop_at_layer"))
        reached = [p for name, p in points.items() if (i := SiteName.parse(name).layer) is None or i in layers]
        where = torch.device(device) if device is not None else self.device
        select.check_padding(self.mask_of(input, *rest, **kwargs))
        check_cache_fits(reached, shape, select, self.embed.weight.element_size(), where, copies=2 if incl_bwd else 1)
        return (input, *rest), kwargs

    def is_packed(self, **model_kwargs: Any) -> bool:
        return model_kwargs.get("document_ids") is not None

    def mask_of(self, *model_args: Any, **model_kwargs: Any) -> Tensor | None:
        given = model_kwargs.get("attention_mask")
        if given is None or isinstance(given, Padding):
            return None if given is None else given.mask
        mask = torch.as_tensor(given, device=self.device).bool()
        return None if bool(mask.all()) else mask


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """torch.bfloat16, "bfloat16" or "torch.bfloat16" as a dtype."""
    if not isinstance(dtype, str):
        return dtype
    found = getattr(torch, dtype.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype must be 'float32', 'float64', 'bfloat16' or 'float16', got {dtype!r}")
    return found


MODELS: dict[str, type[HookedModel]] = {}
"""Every class of models by its family, in the order of definition."""


def model_class(cfg: ModelConfig) -> type[HookedModel]:
    """The model class of a config.

    Raises
    ------
    TypeError
        No class takes this config.
    """
    for cls in MODELS.values():
        if cls.config_class is type(cfg):
            return cls
    known = ", ".join(cls.config_class.__name__ for cls in MODELS.values())
    raise TypeError(f"no model takes a {type(cfg).__name__}; there are models of {known}")
