"""SAELens by heart: what its public names are here. Errors and the table in docs/moving.md are made from this.

A name that exists here is not listed: SAE, encode, decode, W_enc, b_dec, from_pretrained, cfg.d_in, cfg.d_sae ...
"""

from __future__ import annotations

from collections.abc import Mapping

from hooked_mamba import names_elsewhere
from hooked_mamba.names_elsewhere import table as table
from hooked_mamba.transformerlens_names import SAELENS_MODEL

_TRAIN = "train_sae(model, site, layer, architecture, d_sae, n_tokens, text=...)"
_OF = 'SparseCoder with sae_config(site, d, d_sae, architecture="{}")'
_TRANSCODER = "MambaCoder with mambacoder_config(layer, d_model, d_sae)"
_SPLICE = "with splice(model, coders, error=True)"


def _names(name: str) -> list[str]:
    return [f"{name}{end}" for end in ("SAE", "SAEConfig", "TrainingSAE", "TrainingSAEConfig")]


def _family(name: str, use: str) -> dict[str, str]:
    return dict.fromkeys((f"{name}SAE", f"{name}SAEConfig"), use) | dict.fromkeys(
        (f"{name}TrainingSAE", f"{name}TrainingSAEConfig"), f"{use}; trained by train_sae"
    )


TOP: dict[str, str] = {
    **_family("Standard", _OF.format("standard")),
    **_family("TopK", _OF.format("topk")),
    **_family("JumpReLU", _OF.format("jumprelu")),
    **_family("Gated", _OF.format("gated")),
    **_family("BatchTopK", _OF.format("batchtopk")),
    **_family("MatryoshkaBatchTopK", _OF.format("matryoshka")),
    **dict.fromkeys(("AbsTopKSAE", "AbsTopKSAEConfig"), _OF.format("abstopk")),
    **dict.fromkeys(("AbsTopKTrainingSAE", "AbsTopKTrainingSAEConfig"), "none: such coders are read, not trained"),
    **dict.fromkeys(_names("Temporal"), "none: a coder reads one position"),
    **dict.fromkeys(_names("MatchingPursuit"), "none: latents are functions of x W_enc + b_enc"),
    "SAEConfig": "CoderConfig; sae_config(site, d, d_sae) makes one",
    "TrainingSAE": "SparseCoder, which is trained and used as one class",
    "TrainingSAEConfig": "CoderConfig for the coder and saes.training.TrainConfig for the training",
    "Transcoder": _TRANSCODER,
    "TranscoderConfig": "mambacoder_config(layer, d_model, d_sae)",
    "SkipTranscoder": f"{_TRANSCODER}, skip=True",
    "SkipTranscoderConfig": "mambacoder_config(layer, d_model, d_sae, skip=True)",
    "JumpReLUTranscoder": f'{_TRANSCODER}, architecture="jumprelu"',
    "JumpReLUTranscoderConfig": 'mambacoder_config(layer, d_model, d_sae, architecture="jumprelu")',
    "JumpReLUSkipTranscoder": f'{_TRANSCODER}, architecture="jumprelu", skip=True',
    "JumpReLUSkipTranscoderConfig": 'mambacoder_config(layer, d_model, d_sae, architecture="jumprelu", skip=True)',
    "HookedSAETransformer": f"load_model(name) of hooked_mamba, {_SPLICE}",
    "SAETransformerBridge": f"load_model(name) of hooked_mamba, {_SPLICE}",
    "ActivationsStore": "saes.store.make_store(model, streams, text, DataConfig())",
    "LanguageModelSAETrainingRunner": _TRAIN,
    "SAETrainingRunner": _TRAIN,
    "LanguageModelSAERunnerConfig": "saes.training.RunConfig, or the arguments of train_sae",
    "MultiSAETrainingRunner": "saes.training.train_coders(model, coders, text, TrainConfig())",
    "MultiSAETrainingRunnerConfig": "saes.training.RunConfig",
    "MultiSAEEvaluator": "evaluate(model, coders, text)",
    "SAETrainer": "saes.training.Trainer(coders, store, TrainConfig())",
    "LoggingConfig": 'loggers=["wandb"] or ["tensorboard"] of train_sae',
    "CacheActivationsRunner": "saes.store.capture_to_disk, or DataConfig(folder=, disk_tokens=)",
    "CacheActivationsRunnerConfig": "saes.store.DataConfig(folder=, disk_tokens=)",
    "PretokenizeRunner": "none: text=, which may be token ids, is tokenized while it is read",
    "PretokenizeRunnerConfig": "none: text=, which may be token ids, is tokenized while it is read",
    "pretokenize_runner": "none: text=, which may be token ids, is tokenized while it is read",
    "run_evals": "evaluate(model, coders, text)",
    "upload_saes_to_huggingface": 'saes.hub.push({"name": coder}, "owner/repository")',
    "PretrainedSaeHuggingfaceLoader": 'SparseCoder.from_pretrained("owner/repository", "folder")',
    "PretrainedSaeDiskLoader": "SparseCoder.load(folder)",
    "load_model": "hooked_mamba.load_model(name)",
    "get_pretrained_saes_directory": "saes.hub.list_coders(), of the package, or list_coders(repository)",
    "PretrainedSAELookup": "saes.registry.Entry, of which saes.hub.list_coders(source) gives a list",
    "get_repo_id_and_folder_name": 'none: SparseCoder.from_pretrained("owner/repository", "folder") takes both',
    "get_norm_scaling_factor": "SparseCoder.load(folder, norm_factor=...)",
    "get_neuronpedia_quick_list": "none: explore(model, coders, text) writes a page of its own",
    "open_neuronpedia_feature_dashboard": "none: explore(model, coders, text) writes a page of its own",
    "EvalConfig": "the arguments of evaluate(model, coders, text, metrics, n_tokens=...)",
    "get_eval_everything_config": "none: evaluate(model, coders, text) measures everything",
    "get_downstream_reconstruction_metrics": 'evaluate(model, coders, text, ["loss"])',
    "get_sparsity_and_variance_metrics": 'evaluate(model, coders, text, ["reconstruction", "sparsity"])',
    "register_sae_class": "none: architectures are in saes.activations",
    "register_sae_training_class": "none: architectures are in saes.activations",
}
"""Names of the package sae_lens -> what to use of the package saes."""

MODULES: dict[str, str] = {
    "evals": "saes.evaluation: evaluate(model, coders, text)",
    "toolkit": "saes.hub, saes.find and saes.files",
    "loading": "saes.hub, saes.find and saes.files",
    "analysis": "saes.explorer, saes.splicing and saes.features",
    "saes": "saes.coder: SparseCoder, with saes.config.CoderConfig; saes.activations has the architectures",
    "constants": "none",
    "util": "none",
    "tutorial": "none",
    "tokenization_and_batching": "saes.store.rows",
    "llm_sae_training_runner": _TRAIN,
    "sae_training_runner": _TRAIN,
    "multi_sae_training_runner": "saes.training.train_coders(model, coders, text, TrainConfig())",
    "cache_activations_runner": "saes.store.capture_to_disk, or DataConfig(folder=, disk_tokens=)",
    "training.activations_store": "saes.store.make_store(model, streams, text, DataConfig())",
    "training.mixing_buffer": "saes.store.ActivationStore, which shuffles within blocks",
    "training.activation_scaler": 'input_norm="scale" of a coder while it is trained',
    "training.sae_trainer": "saes.training.trainer",
    "training.multi_sae_trainer": "saes.training.trainer",
    "training.training_sae": "saes.coder: SparseCoder, which is trained and used as one class",
    "training.optim": "none: TrainConfig has warmup and decay",
    "training.types": "none",
    "training.upload_saes_to_huggingface": 'saes.hub.push({"name": coder}, "owner/repository")',
}
"""Its modules -> what to use."""

SYNTHETIC: dict[str, str] = {
    **dict.fromkeys(
        ("FeatureDictionary", "FeatureDictionaryInitializer", "SyntheticModel", "orthogonal_initializer"),
        "saes.synthetic.plant(scenario, ...), whose atoms are given",
    ),
    **dict.fromkeys(
        (
            "ActivationGenerator",
            "generate_activations",
            "SyntheticActivationIterator",
            "SyntheticDataActivationIterator",
        ),
        "plant(scenario, ...).sample(n, generator)",
    ),
    **dict.fromkeys(
        ("TreeFeatureGenerator", "HierarchyNode", "create_correlation_matrix", "generate_random_correlation_matrix"),
        "plant(scenario, ...): correlated and families are scenarios",
    ),
    **dict.fromkeys(
        ("eval_sae_on_synthetic", "eval_sae_on_synthetic_data", "SyntheticEvalResult"),
        "saes.metrics.recovery",
    ),
    **dict.fromkeys(
        ("train_sae_on_synthetic", "train_toy_sae", "SyntheticSAERunner"),
        "saes.training.Trainer(coders, ActivationStore(MemoryBlocks({site: x}), batch_size), TrainConfig())",
    ),
}
"""Names of its modules synthetic and toy_model -> what to use of saes.synthetic."""

CODER: dict[str, str] = {
    "from_pretrained_with_cfg_and_sparsity": "SparseCoder.from_pretrained(name, subfolder); its config is coder.cfg",
    "from_dict": "SparseCoder(CoderConfig.from_dict(values))",
    "get_sae_class_for_architecture": "SparseCoder, for every architecture",
    "get_sae_config_class_for_architecture": "CoderConfig, for every architecture",
    "use_error_term": "splice(model, coder, error=True)",
    "fold_W_dec_norm": "none: decoder rows are kept at norm 1 in training, except with decoder_norm=False",
    "get_W_dec_norm": "coder.W_dec.norm(dim=1)",
    "fold_and_get_W_dec_norm": "none: decoder rows are kept at norm 1 in training, except with decoder_norm=False",
    "fold_activation_norm_scaling_factor": "SparseCoder.load(folder, norm_factor=...); our own coders: coder.fold()",
    "fold_activation_whitening": "none: inputs are not whitened",
    "get_activation_fn": "coder.activation",
    "activation_fn": "coder.activation",
    "initialize_weights": "SparseCoder(cfg, seed=...), and saes.init.initialise(coder, x, y)",
    "process_sae_in": "none: encode takes activations as they are",
    "encode_with_hidden_pre": "coder.encode(x) and coder.preact(x)",
    "hook_sae_input": "the model's own site, coder.cfg.in_site",
    "hook_sae_acts_pre": "coder.preact(x)",
    "hook_sae_acts_post": "splice(model, coder, record=True), or encode_on(model, coder, text)",
    "hook_sae_recons": "coder(x)",
    "hook_sae_output": "the model's own site, coder.cfg.out_site, inside splice(model, coder)",
    "hook_sae_error": "misses(model, coder, text)",
    "run_with_cache": "encode_on(model, coder, text): a coder has no hook points of its own",
    "run_with_hooks": "splice(model, coder, features=...): a coder has no hook points of its own",
    "turn_on_forward_pass_hook_z_reshaping": "none: sites with several axes are flattened",
    "turn_off_forward_pass_hook_z_reshaping": "none: sites with several axes are flattened",
    "process_state_dict_for_saving": "saes.files.saelens.to_file(cfg, state)",
    "process_state_dict_for_loading": "saes.files.saelens.from_file(cfg, state, where)",
    "save_inference_model": "coder.save(folder)",
    "training_forward_pass": "saes.loss.loss(coder, x, y, LossState.of(coder))",
    "calculate_aux_loss": "saes.loss.loss(coder, x, y, LossState.of(coder)).aux",
    "get_coefficients": "the fields of LossState: aux_alpha, sparsity, wide_alpha",
    "log_histograms": "evaluate(model, coder, text), whose report has the histogram of densities",
    "load_weights_from_checkpoint": "train_sae(..., out=folder, resume=True)",
}
"""Methods and attributes of its SAE -> what to use of a coder. What has the same meaning works under its name."""

LOADING: dict[str, str] = {
    "release": "name, the first argument",
    "sae_id": "subfolder",
}
"""Arguments of its from_pretrained -> those of SparseCoder.from_pretrained."""

CONFIG: dict[str, str] = {
    "metadata": "the fields of the config itself: in_site, out_site, model_name, model_hash",
    "dtype": "coder.W_enc.dtype",
    "device": "coder.W_enc.device",
    "normalize_activations": 'input_norm, "scale" while a coder is trained',
    "reshape_activations": "none: sites with several axes are flattened",
    "rescale_acts_by_decoder_norm": "none: it is worked into the weights when a file is read",
    "hook_head_index": "none; channels= of DataConfig chooses heads or channels of a site",
    "hook_layer": "layer",
    "context_size": "context_length of DataConfig",
    "prepend_bos": "none: no BOS is prepended",
    "dataset_path": "text of train_sae",
    "activation_fn_str": "architecture",
    "expansion_factor": "d_sae / d_in",
    "l1_coefficient": "sparsity of TrainConfig",
}
"""Fields of its config -> what to use of a CoderConfig."""

OPTIONS: dict[str, str] = {
    "training_tokens": "n_tokens",
    "train_batch_size_tokens": "batch_size",
    "context_size": "context_length",
    "expansion_factor": "d_sae, the number of latents itself",
    "hook_name": "hook_site",
    "hook_layer": "layer",
    "dataset_path": "text",
    "l1_coefficient": "sparsity",
    "l1_warm_up_steps": "sparsity_warmup, a share of the steps",
    "l0_coefficient": "sparsity",
    "l0_warm_up_steps": "sparsity_warmup, a share of the steps",
    "jumprelu_bandwidth": "bandwidth",
    "lr_warm_up_steps": "warmup, a share of the steps",
    "lr_decay_steps": "decay, a share of the steps",
    "adam_beta1": "beta1",
    "adam_beta2": "beta2",
    "dead_feature_window": "dead_after_tokens",
    "normalize_activations": 'input_norm, "scale" by default',
    "store_batch_size_prompts": "rows_per_pass",
    "n_batches_in_buffer": "block_tokens, in positions",
    "n_checkpoints": "checkpoint_every, in steps",
    "checkpoint_path": "out",
    "output_path": "out",
    "resume_from_checkpoint": "resume=True, with out",
    "logger": "loggers",
    "verbose": "progress",
    "seqpos_slice": "positions_per_row",
    "prepend_bos": "none: no BOS is prepended",
    "model_name": "the model itself, the first argument",
}
"""Options of its training runner -> those of train_sae."""

MODEL = SAELENS_MODEL
"""Methods of its HookedSAETransformer -> what to write with a model of hooked_mamba, whose errors say it."""


def advice(name: str, uses: Mapping[str, str]) -> str:
    """One line: what SAELens' name is here."""
    return names_elsewhere.advice(name, uses, names_elsewhere.SAE_LENS)
