"""Public names of transformer-lens 2.18.0 and 4.3.0, read from their sources with `ast`: no import of them is needed.

Of a class its methods, fields and the attributes that it sets on itself; of a module its functions and constants.
"""

# ruff: noqa: SIM905

TOP = """
    hook_points utils evals HookedTransformerKeyValueCache HookedTransformerKeyValueCacheEntry components
    factories HookedTransformerConfig FactoredMatrix ActivationCache HookedTransformer SVDInterpreter
    HookedEncoder HookedAudioEncoder HookedEncoderDecoder BertNextSentencePrediction head_detector loading
    patching train lit EasyTransformerKeyValueCache EasyTransformerKeyValueCacheEntry EasyTransformer
    EasyTransformerConfig conversion_utils supported_models tools utilities TransformerLensKeyValueCache
    TransformerLensKeyValueCacheEntry TransformerBridgeConfig HookedRootModule loading_from_pretrained
    TransformerBridge
""".split()

MODEL = """
    ln_final tokenizer check_hooks_to_add get_pos_offset get_residual input_to_embed forward loss_fn
    run_with_cache set_tokenizer to_tokens to_string to_str_tokens to_single_token to_single_str_token
    get_token_position tokens_to_residual_directions to cuda cpu mps move_model_modules_to_device
    from_pretrained from_pretrained_no_processing init_weights load_and_process_state_dict fill_missing_keys
    fold_layer_norm center_writing_weights center_unembed fold_value_biases refactor_factored_attn_matrices
    set_use_attn_result set_use_split_qkv_input set_use_hook_mlp_in set_use_attn_in
    set_ungroup_grouped_query_attention process_weights_ generate W_U b_U W_E W_pos W_E_pos W_K W_Q W_V W_O W_in
    W_gate W_out b_K b_Q b_V b_O b_in b_out QK OV accumulated_bias all_composition_scores all_head_labels
    load_sample_training_dataset sample_datapoint cfg embed hook_embed blocks unembed dataset pos_embed
    hook_pos_embed hook_tokens name mod_dict hook_dict setup hook_points remove_all_hook_fns clear_contexts
    reset_hooks check_and_add_hook add_hook add_perma_hook hooks run_with_hooks add_caching_hooks
    get_caching_hooks cache_all cache_some is_caching context_level list_hooks boot_transformers original_model
    n_params_total enable_compatibility_mode process_weights encoder_output to_sentence_pair_tokens
    predict_next_sentence blocks_with stack_params_for QK_for_attn_layers OV_for_attn_layers
    composition_layer_indices block_hooks block_submodules layer_types attn_head_labels parameters
    named_parameters tl_parameters tl_named_parameters diffusion_generate generate_stream hf_generate
    prepare_multimodal_inputs train state_dict load_state_dict get_params real_components processor
    compatibility_mode hook_aliases clear_hook_registry close get_hook_point adapter
""".split()

CACHE = """
    remove_batch_dim to toggle_autodiff keys values items apply_slice_to_batch_dim accumulated_resid logit_attrs
    decompose_resid compute_head_results stack_head_results stack_activation get_neuron_results
    stack_neuron_results apply_ln_to_stack get_full_resid_decomposition cache_dict model has_batch_dim has_embed
    has_pos_embed logit_lens ssm_layers compute_ssm_effective_attention compute_ssm_state
""".split()

BLOCK = ("cfg", "ln1", "ln2", "attn", "mlp", "hook_resid_pre", "hook_resid_post")

POINT = """
    add_perma_hook add_hook remove_hooks clear_context forward layer fwd_hooks bwd_hooks ctx name has_hooks
    enable_reshape hook_conversion backward_scale pos_dim
""".split()

UTILS = """
    Slice LocallyOverridenDefaults is_library_available select_compatible_kwargs download_file_from_hf
    clear_huggingface_cache print_gpu_mem get_corner to_numpy lm_cross_entropy_loss lm_accuracy
    calc_fan_in_and_fan_out init_xavier_uniform_ init_xavier_normal_ init_kaiming_uniform_ init_kaiming_normal_
    keep_single_column tokenize_and_concatenate sample_logits get_act_name remove_batch_dim test_prompt
    transpose composition_scores get_dataset is_square is_lower_triangular check_structure get_device
    warn_if_mps override_or_use_default_value get_offset_position_ids get_cumsum_along_dim get_attention_mask
    repeat_along_head_dimension get_nested_attr set_nested_attr get_tokenizer_with_bos
    get_input_with_manually_prepended_bos get_tokens_with_bos_removed CACHE_DIR USE_DEFAULT_VALUE
    ACTIVATION_FN_DICT SliceInput SOFTCAP_DISABLED SUPPORTED_ACTIVATIONS ActivationFunction apply_softcap
    gelu_fast gelu_new softcap_enabled solu ModelWithCfg move_to_and_update_config get_rotary_pct_from_config
    NonlinearityType logits_to_df get_matrix_corner calculate_available_device_cuda_memory count_unique_devices
    determine_available_memory_for_available_devices find_embedding_device get_best_available_cuda_device
    get_best_available_device get_device_for_block_index resolve_device_map
    sort_devices_based_on_available_memory temporarily_swap_parameter SuccessRateInterval bootstrap_ci
    derive_generator sign_flip_permutation_pvalue standard_error success_rate_ci filter_dict_by_prefix
    TypedModuleList
""".split()

PATCHING = """
    make_df_from_ranges generic_activation_patch layer_pos_patch_setter layer_pos_head_vector_patch_setter
    layer_head_vector_patch_setter layer_head_pattern_patch_setter layer_head_pos_pattern_patch_setter
    layer_head_dest_src_pos_pattern_patch_setter get_act_patch_attn_head_all_pos_every
    get_act_patch_attn_head_by_pos_every get_act_patch_block_every Logits AxisNames CorruptedActivation
    PatchedActivation get_act_patch_resid_pre get_act_patch_resid_mid get_act_patch_attn_out
    get_act_patch_mlp_out get_act_patch_attn_head_out_by_pos get_act_patch_attn_head_q_by_pos
    get_act_patch_attn_head_k_by_pos get_act_patch_attn_head_v_by_pos get_act_patch_attn_head_pattern_by_pos
    get_act_patch_attn_head_pattern_dest_src_pos get_act_patch_attn_head_out_all_pos
    get_act_patch_attn_head_q_all_pos get_act_patch_attn_head_k_all_pos get_act_patch_attn_head_v_all_pos
    get_act_patch_attn_head_pattern_all_pos PatchingResult get_act_patch_direct_path
    get_act_patch_direct_path_all_sources MetricFn Reduce
""".split()

FACTORED = """
    AB BA svd U S Vh eigenvalues norm make_even get_corner ndim collapse_l collapse_r unsqueeze pair A B ldim
    rdim mdim has_leading_dims shape V
""".split()

CONFIG = """
    n_layers d_model n_ctx d_head model_name n_heads d_mlp act_fn d_vocab eps use_attn_result use_attn_scale
    attn_scale use_split_qkv_input use_hook_mlp_in use_attn_in use_qk_norm use_local_attn
    ungroup_grouped_query_attention original_architecture from_checkpoint checkpoint_index checkpoint_label_type
    checkpoint_value tokenizer_name window_size attn_types init_mode normalization_type device n_devices
    attention_dir attn_only seed initializer_range init_weights scale_attn_by_inverse_layer_idx
    positional_embedding_type final_rms d_vocab_out parallel_attn_mlp rotary_dim n_params use_hook_tokens
    gated_mlp default_prepend_bos dtype tokenizer_prepends_bos n_key_value_heads post_embedding_ln rotary_base
    rotary_base_local trust_remote_code rotary_adjacent_pairs load_in_4bit num_experts experts_per_token
    relative_attention_max_distance relative_attention_num_buckets decoder_start_token_id tie_word_embeddings
    use_normalization_before_and_after attn_scores_soft_cap output_logits_soft_cap use_NTK_by_parts_rope
    NTK_by_parts_low_freq_factor NTK_by_parts_high_freq_factor NTK_by_parts_factor NTK_original_ctx_len unwrap
    from_dict to_dict set_seed_everywhere is_layer_norm_activation uses_rms_norm layer_norm_folding head_dim
    architecture tokenizer_appends_eos default_padding_side split_attention_weights qk_norm_after_rope
    rotary_interleaved_cos_sin per_layer_head_dim per_layer_num_key_value_heads scale_embedding
    rmsnorm_uses_offset attn_implementation is_audio_model is_visual_model is_stateful is_multimodal
    vision_hidden_size vision_num_layers vision_num_heads mm_tokens_per_image
""".split()

ARGUMENTS = {
    "from_pretrained": """
        model_name fold_ln center_writing_weights center_unembed refactor_factored_attn_matrices checkpoint_index
    checkpoint_value hf_model device n_devices tokenizer move_to_device fold_value_biases default_prepend_bos
    default_padding_side dtype first_n_layers n_ctx
    """.split(),
    "forward": """
        input return_type loss_per_token prepend_bos padding_side start_at_layer tokens shortformer_pos_embed
    attention_mask stop_at_layer past_kv_cache labels pixel_values input_values past_key_values
    """.split(),
    "generate": """
        input max_new_tokens stop_at_eos eos_token_id do_sample top_k top_p temperature freq_penalty
    use_past_kv_cache prepend_bos padding_side return_type verbose repetition_penalty output_logits return_cache
    return_input_tokens names_filter device pixel_values stop_strings stopping_criteria attention_mask
    forced_bos_token_id
    """.split(),
    "to_tokens": """
        input prepend_bos padding_side move_to_device truncate
    """.split(),
    "to_str_tokens": """
        input prepend_bos padding_side
    """.split(),
    "get_token_position": """
        single_token input mode prepend_bos padding_side
    """.split(),
}
