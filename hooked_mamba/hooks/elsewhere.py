"""What TransformerLens' site names mean in a model that has no site of that name."""

from __future__ import annotations

from collections.abc import Sequence

_NO_MLP = "this block has no MLP such as TransformerLens': its mixer does the work of attention and MLP"
_NO_HEADS = "this block has no attention"
_AS_MATRIX = f"{_NO_HEADS}; cache.hidden_attention(layer) is the mixer as a matrix of positions"
_STATE = "the state after position t is 'h.{t}', those after every position 'h'"
_READS = "every branch reads its norm's output"

MEANT: dict[str, tuple[str, tuple[str, ...]]] = {
    "attn_out": ("here it is what the mixer adds to the stream", ("hook_out_proj", "hook_mixer_out", "hook_out")),
    "mlp_out": (_NO_MLP, ("hook_mlp_out", "hook_out_proj", "hook_out")),
    "mlp_in": (_READS, ("hook_resid_mid", "hook_resid_pre")),
    "attn_in": (_READS, ("hook_resid_pre",)),
    "q_input": (_READS, ("norm.hook_out",)),
    "k_input": (_READS, ("norm.hook_out",)),
    "v_input": (_READS, ("norm.hook_out",)),
    "resid_mid": ("a block of one stage has no middle: the stream is resid_pre and resid_post", ("hook_resid_post",)),
    "pattern": (_AS_MATRIX, ()),
    "attn_scores": (_AS_MATRIX, ()),
    "attn": (_AS_MATRIX, ("hook_pattern",)),
    "q": (f"{_NO_HEADS}; C reads the state as a query does", ("hook_q", "hook_C", "hook_r")),
    "k": (f"{_NO_HEADS}; B writes to the state as a key does", ("hook_k", "hook_B")),
    "v": (f"{_NO_HEADS}; x is what is written to the state", ("hook_v", "hook_x")),
    "rot_q": (f"{_NO_HEADS} with rotated queries; C reads the state as a query does", ("hook_q", "hook_C", "hook_r")),
    "rot_k": (f"{_NO_HEADS} with rotated keys; B writes to the state as a key does", ("hook_k", "hook_B")),
    "z": (
        f"{_NO_HEADS}; its z is here what the scan reads out, y, and a mixer's gate is 'mixer.z'",
        ("hook_y", "hook_y_scan"),
    ),
    "result": (
        f"{_NO_HEADS}; cache.stack_head_results() and stack_channel_results() take the output apart",
        ("hook_y_gated",),
    ),
    "pre": (_NO_MLP, ("hook_pre", "hook_z", "hook_in_proj")),
    "post": (_NO_MLP, ("hook_post", "hook_gate", "hook_y_gated")),
    "mid": (_NO_MLP, ("hook_y_gated",)),
    "pre_linear": (_NO_MLP, ("hook_pre_linear", "hook_in_proj")),
    "pos_embed": ("these models have no position embedding", ("hook_embed",)),
    "state": (_STATE, ("hook_h",)),
    "ssm_state": (_STATE, ("hook_h",)),
    "wkv": (_STATE, ("hook_h",)),
    "resid_per": ("the stream is resid_pre and resid_post", ("hook_resid_pre",)),
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
        "blocks.3." if the name has one. The same site in another block comes before other sites of this one.
    """
    known = MEANT.get(name.rpartition(".")[2].removeprefix("hook_"))
    if known is None:
        return None
    text, hooks = known
    if block is not None:  # the site itself, in another block of a hybrid
        same = name.removeprefix(block)
        for full in names:
            if full.partition(".")[2].partition(".")[2] == same:
                return text, full
    for hook in hooks:
        for full in names:
            if f".{full}".endswith(f".{hook}") and (block is None or full.startswith(block)):
                return text, full
    return text, ""
