"""A TransformerLens user's session, typed from memory: what does not work says in one line what to use here."""

from __future__ import annotations

import pytest
import torch

from hooked_mamba import HookedMamba, utils

LINES = """
from hooked_mamba.hook_points import HookPoint, HookedRootModule
from hooked_mamba import HookedTransformer
from hooked_mamba import ActivationCache, FactoredMatrix, utils, patching
HookedMamba.from_pretrained("tinystories-4l", fold_ln=False, center_unembed=False, device="cpu")
HookedMamba.from_pretrained("tinystories-4l", center_unembed=True, center_writing_weights=True, fold_ln=True)
HookedMamba.from_pretrained_no_processing("tinystories-4l", dtype=torch.float32)
model.cfg.n_layers, model.cfg.d_model, model.cfg.d_vocab, model.cfg.model_name
model.cfg.n_heads
model.cfg.n_ctx
model.cfg.d_head
model.cfg.d_mlp
model.cfg.device
model.cfg.dtype
model.cfg.act_fn
model.to("cpu"); model.eval()
model.to_tokens("Once upon a time", prepend_bos=True)
model.to_tokens(["Once upon", "a time there was"], padding_side="left")
model.to_str_tokens("Once upon a time")
model.to_string(tokens[0])
model.to_single_token(" girl"), model.to_single_str_token(5)
model.get_token_position(" a", "Once upon a time")
model(tokens, return_type="loss"), model("Once upon a time", return_type="both")
model(tokens, loss_per_token=True, return_type="loss").shape
model.generate("Once upon a time", max_new_tokens=3, temperature=0.7, top_k=5, verbose=False)
model.generate(tokens, max_new_tokens=2, use_past_kv_cache=True, stop_at_eos=False, verbose=False)
model.run_with_cache(tokens, names_filter=lambda name: name.endswith("resid_post"))[1].keys()
model.run_with_cache(tokens, remove_batch_dim=True, stop_at_layer=2)
logits, cache = model.run_with_cache(tokens); cache["resid_pre", 2], cache["blocks.0.hook_resid_post"], cache["embed"]
cache["pattern", 1]
cache["attn_out", 1]
cache["mlp_out", 1]
cache["z", 1]
cache["q", 0, "attn"]
cache["post", 0, "mlp"]
cache["resid_mid", 0]
cache["scale"], cache["normalized", 2, "ln1"]
cache.decompose_resid(layer=-1, return_labels=True)
cache.accumulated_resid(layer=-1, incl_mid=False, pos_slice=-1, return_labels=True)
cache.logit_attrs(cache.decompose_resid(pos_slice=-1), tokens=" girl", pos_slice=-1)
cache.apply_ln_to_stack(cache.accumulated_resid(layer=-1), layer=-1)
cache.stack_head_results(layer=-1, pos_slice=-1)
cache.stack_activation("resid_post").shape
cache.compute_head_results()
cache.stack_neuron_results(layer=-1)
cache.get_full_resid_decomposition(pos_slice=-1, expand_neurons=False)
model.tokens_to_residual_directions(model.to_single_token(" girl")).shape
model.W_U.shape, model.W_E.shape, model.b_U.shape
model.W_Q, model.W_K
model.W_O
model.W_pos
model.QK
model.OV
model.all_head_labels
model.all_composition_scores("Q")
model.add_hook("blocks.0.hook_resid_pre", lambda x, hook: x); model.reset_hooks()
model.add_perma_hook("hook_embed", lambda x, hook: None); model.remove_all_hook_fns()
model.run_with_hooks(tokens, fwd_hooks=[(utils.get_act_name("resid_pre", 1), lambda x, hook: x * 0)])
model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_pattern", lambda x, hook: x)])
with model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", lambda x, hook: x)]): model(tokens)
len(model.hook_points()), list(model.hook_dict)[:3], model.mod_dict
model.set_use_attn_result(True)
model.setup(); model.hook_dict["hook_embed"].name
model.blocks[0].hook_resid_pre.add_hook(lambda x, hook: None); model.reset_hooks(including_permanent=True)
utils.test_prompt("Once upon a", "time", model, prepend_bos=False)
utils.get_act_name("pattern", 3), utils.get_act_name("resid_post", 0), utils.to_numpy(model.W_U).shape
utils.lm_cross_entropy_loss(model(tokens), tokens), utils.lm_accuracy(model(tokens), tokens)
utils.get_corner(model.W_E), utils.get_device(), utils.remove_batch_dim(tokens)
utils.tokenize_and_concatenate(["a", "b"], model.tokenizer)
utils.download_file_from_hf("NeelNanda/x", "y.pt")
patching.get_act_patch_resid_pre(model, tokens, cache, lambda logits: logits[0, -1, 0], progress=False).shape
patching.get_act_patch_attn_head_out_all_pos(model, tokens, cache, lambda logits: logits[0, -1, 0])
patching.get_act_patch_block_every(model, tokens, cache, lambda logits: logits[0, -1, 0], progress=False).shape
patching.make_df_from_ranges([2, 2], ["layer", "pos"])
model.tokenizer.eos_token, model.set_tokenizer(model.tokenizer)
model.loss_fn(model(tokens), tokens, per_token=True).shape
model.input_to_embed(tokens)
model(tokens, past_kv_cache=object())
model.fold_layer_norm(model.state_dict())
FactoredMatrix(torch.randn(4, 2), torch.randn(2, 4)).svd(), FactoredMatrix(torch.eye(2), torch.eye(2)).eigenvalues
from hooked_mamba import HookedTransformerConfig
from hooked_mamba import head_detector, evals
model.load_sample_training_dataset()
""".strip().splitlines()


HELPS = (
    " is here: ",
    "has no counterpart here",
    "nearest: ",
    "this block has no attention",
    "use stack_channel_results",
)
"""What an error must say."""


@pytest.fixture(scope="module")
def session():
    model = HookedMamba.from_pretrained("tinystories-4l")
    tokens = model.to_tokens("Once upon a time there was a little girl")
    return {"torch": torch, "HookedMamba": HookedMamba, "utils": utils, "model": model, "tokens": tokens}


def test_a_session_from_memory(session, capsys, unchecked):
    """Of these lines at least 95% work, or say on one line what to use here."""
    assert len(LINES) >= 60
    silent, worked = [], 0
    for line in LINES:
        try:
            exec(compile(line, "session", "exec"), session)
            worked += 1
        except Exception as error:
            said = str(error)
            helps = "\n" not in said and any(part in said for part in HELPS)
            if not helps:
                silent.append(f"{line}\n    {type(error).__name__}: {said}")
    print(f"{worked} of {len(LINES)} work, {len(LINES) - worked - len(silent)} say what to use, {len(silent)} neither")
    assert worked >= len(LINES) // 2
    assert len(silent) <= 0.05 * len(LINES), "\n".join(silent)
