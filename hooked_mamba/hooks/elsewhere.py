"""What TransformerLens' names of sites mean in a model that has no site of that name."""

from __future__ import annotations

from collections.abc import Sequence

_NO_MLP = "this model has no such site of an MLP; a Mamba block has one mixer for the work of attention and MLP"
_NO_HEADS = "this model has no attention at such a place"

MEANT: dict[str, tuple[str, tuple[str, ...]]] = {
    "attn_out": ("what the mixer adds to the stream", ("hook_out_proj", "hook_mixer_out", "hook_out")),
    "mlp_out": (_NO_MLP, ("hook_mlp_out", "hook_out_proj")),
    "mlp_in": (_NO_MLP, ("hook_resid_pre",)),
    "attn_in": ("what the mixer's norm reads", ("hook_resid_pre",)),
    "resid_mid": ("a block of one branch has no middle: the stream is resid_pre and resid_post", ("hook_resid_post",)),
    "pattern": (f"{_NO_HEADS}; cache.hidden_attention(layer) is the scan as a matrix", ("hook_pattern",)),
    "attn_scores": (f"{_NO_HEADS}; cache.hidden_attention(layer) is the scan as a matrix", ("hook_attn_scores",)),
    "attn": (f"{_NO_HEADS}; cache.hidden_attention(layer) is the scan as a matrix", ("hook_pattern",)),
    "q": ("C reads the state as a query does", ("hook_q", "hook_C", "hook_r")),
    "k": ("B writes to the state as a key does", ("hook_k", "hook_B")),
    "v": ("x is what is written to the state", ("hook_v", "hook_x")),
    "rot_q": ("C reads the state as a query does; nothing is rotated", ("hook_rot_q", "hook_C")),
    "rot_k": ("B writes to the state as a key does; nothing is rotated", ("hook_rot_k", "hook_B")),
    "z": ("attention's z is what the scan reads out, y", ("hook_y", "hook_y_scan")),
    "result": ("cache.stack_head_results() and stack_channel_results() take the output apart", ("hook_y_gated",)),
    "pre": (_NO_MLP, ("hook_z", "hook_in_proj")),
    "post": (_NO_MLP, ("hook_gate", "hook_y_gated")),
    "mid": (_NO_MLP, ("hook_y_gated",)),
    "pre_linear": (_NO_MLP, ("hook_in_proj",)),
    "pos_embed": ("these models have no position embedding", ("hook_embed",)),
    "resid_per": ("not the name of a site: the stream is resid_pre and resid_post", ("hook_resid_pre",)),
}
"""Short name in TransformerLens -> what it means here, and hooks that come close, the nearest first."""


def meant_by(name: str, names: Sequence[str], block: str | None) -> tuple[str, str] | None:
    """What a name of TransformerLens means here, and the site of this model (of one block) that comes closest.

    Parameters
    ----------
    name
        Full name that no site has.
    names
        All sites of the model.
    block
        "blocks.3." if it names one.
    """
    known = MEANT.get(name.rpartition(".")[2].removeprefix("hook_"))
    if known is None:
        return None
    text, hooks = known
    for hook in hooks:
        for full in names:
            if full.rpartition(".")[2] == hook and (block is None or full.startswith(block)):
                return text, full
    return text, ""
