"""Names of other trainers that are no fields here: which field says the same, or why there is none.

Those of `aliases` are accepted as they are and do not stand here. Names of transformers 5.24 (TrainingArguments), PEFT 0.21
(LoraConfig), TRL 0.9 to 1.1 (SFTConfig, DPOConfig, ModelConfig), axolotl 0.12 and LLaMA-Factory 0.9, and other common spellings.
"""

_ROUNDS = "a run is train.rounds rounds of train.local_steps steps (or train.local_epochs passes)"
_EVERY_ROUND = "every round is recorded in metrics.jsonl and printed; report_to names trackers"
_PROCESSES = ("peers are spread over the processes that torchrun or srun starts; processes_per_peer: 2 has the base model in parts, "
              "by FSDP")
_NO_COLLECTOR = "examples are tokenised before the first round and padded to the longest of their batch; nothing is left to choose"
_PREFERENCES = "there is DPO against the base model, model.task: {name: preference, beta: 0.1, label_smoothing: 0.0}"
_ONE_SHAPE = "every adapted layer of a peer has one lora.rank and one lora.alpha; ranks may differ from peer to peer"
_HUB = "`dfl export RUN --push OWNER/NAME` uploads a model when the run is done"
_PRECISION = "model.dtype is that of the frozen base weights, train.autocast that of the computation; factors are float32"
_QUANTISED = "model.quantization is the field for it: nf4, fp4 or int8, torchao_int8 or torchao_int4"
_ATTENTION = "model.attention is the field for it"
_TEMPLATE = "data.template is the field for it, with data.messages, data.tools and data.system; null: the tokenizer's own"

# what there is to say -> the names it answers
_ANSWERS: dict[str, str] = {
    # fields under another name
    "model.name is the field for it: a hub name or a folder": "model_name_or_path base_model model_id base_model_name_or_path "
        "tokenizer_name model_path",
    "model.task is the field for it": "stage model_type auto_model_class",
    "data.max_length is the field for it, in tokens": "max_seq_length max_seq_len sequence_len cutoff_len model_max_length "
        "max_prompt_length max_completion_length max_target_length max_source_length eval_sequence_len",
    "data.text is the field for it, the column of the texts": "dataset_text_field text_column text_field field",
    "data.prompt and data.response are the fields for it, the columns of prompt and answer": "prompt_column response_column "
        "prompt_field field_instruction field_output field_input formatting_func completion_column type",
    "data.messages is the field for it, the column of conversations": "field_messages message_field conversations",
    "data.source (file or hub) with data.train, or data.name, is the field for it": "dataset dataset_name datasets train_dataset "
        "train_file dataset_dir dataset_path data_path dataset_config train_data media_dir data_files",
    "data.valid is the field for it, a file or a split": "eval_dataset validation_file test_datasets dataset_test_split eval_file",
    "data.train is the field for it, the name of a split": "dataset_train_split split",
    "data.valid_fraction is the field for it": "val_set_size val_size test_size validation_split_percentage",
    "data.max_train is the field for it, and data.max_valid for the others": "max_samples max_train_samples max_eval_samples",
    "data.label is the field for it, the column of the labels": "label_column label_column_name label_names",
    "data.train names a file, and nothing is kept of it between runs": "dataset_prepared_path overwrite_cache cache_dir "
        "tokenized_path push_dataset_to_hub",
    "train.batch_size is the field for it, of every peer": "micro_batch_size per_gpu_train_batch_size train_batch_size batch",
    "eval.batch_size is the field for it": "eval_batch_size per_gpu_eval_batch_size",
    "train.accumulation is the field for it": "accumulation_steps grad_accum gradient_accumulation accumulate_grad_batches",
    f"{_ROUNDS}; give num_train_epochs, or train.rounds": "num_epochs epochs n_epochs max_epochs num_rounds num_steps total_steps "
        "train_steps steps",
    "train.lr is the field for it": "lr_rate base_lr learning_rate_init",
    "train.schedule is the field for it, with its parameters, and train.warmup": "lr_scheduler scheduler cosine_min_lr_ratio "
        "cosine_constant_lr_ratio lr_scheduler_kwargs",
    "train.warmup is the field for it, a fraction of the run": "lr_warmup num_warmup_steps warmup_fraction",
    "train.clip is the field for it": "gradient_clipping clip_grad_norm grad_clip max_gradient_norm gradient_clip_val",
    "train.optimizer is the field for it, with train.betas, train.eps and train.momentum": "optim_args "
        "optim_target_modules use_galore use_badam use_apollo use_muon galore_rank ",
    "train.autocast is the field for it": "bf16_full_eval mixed_precision amp pure_bf16 upcast_layernorm half_precision_backend",
    _PRECISION: "fp16_full_eval float16 bfloat16 torch_dtype precision half tf32 fp8",
    "lora.rank is the field for it": "lora_r lora_rank lora_dim",
    "lora.targets is the field for it": "lora_target lora_target_modules target_parameters lora_target_parameters peft_layers "
        "lora_target_linear",
    "lora.alpha is the field for it": "lora_scale lora_scaling",
    "lora.dropout is the field for it": "lora_drop",
    "lora.adapter is the field for it: dora": "use_dora peft_use_dora lora_use_dora ",
    "lora.adapter is the field for it: lora, dora, hira, sb or ravan": "peft_type finetuning_type use_peft peft_config lora_config "
        "adapter_type",
    "lora.rslora is the field for it": "peft_use_rslora use_rank_stabilized_lora",
    "lora.start is the field for it: kaiming, pissa, olora or gradient": "init_lora_weights pissa_init pissa_iter loftq_config "
        "eva_config corda_config lora_ga_config peft_init_lora_weights loftq_init",
    "lora.head says what becomes of a new head: frozen, mixed or local": "lora_modules_to_save additional_target modules_to_not_save "
        "",
    "model.layers keeps the first layers; adapters lie on all that are kept": "layers_to_transform layers_pattern exclude_modules "
        "peft_layers_to_transform layer_replication",
    "model.dropout is the field for it": "attention_dropout hidden_dropout_prob classifier_dropout",
    "output is the field for it": "save_dir log_dir logging_dir checkpoint_dir save_path",
    "output names a run; a tracker takes its name from there": "run_name wandb_name wandb_run_id experiment_name project "
        "wandb_project wandb_entity wandb_watch wandb_mode wandb_log_model wandb_run_group mlflow_experiment_name "
        "mlflow_tracking_uri comet_project_name use_tensorboard use_wandb use_mlflow trackio_space_id trackio_bucket_id "
        "trackio_static_space_id swanlab_project use_swanlab",
    "seed is the field for it; every random stream is a function of it": "random_seed shuffle_seed",
    "deterministic is the field for it": "full_determinism",
    "device is the field for it: cpu": "use_cpu no_cuda use_cuda use_mps_device",
    "backend is the field for it (auto, gloo or nccl), and timeout for how long to wait": "ddp_backend ddp_timeout ddp_timeout_delta",
    "eval.every is the field for it, in rounds": "eval_freq evals_per_epoch eval_delay eval_on_start do_eval evaluation_strategy "
        "eval_every validation_steps eval_table_size eval_causal_lm_metrics eval_max_new_tokens",
    "checkpoint.minutes is the field for it, or checkpoint.every in rounds, with checkpoint.keep": "saves_per_epoch save_only_model "
        "save_on_each_node save_freq checkpointing_steps enable_jit_checkpoint save_safetensors ",
    "eval.patience is the field for it, with eval.min_delta": "early_stopping ",
    "eval.primary is the field for it; a metric itself says whether more of it is better": "metric_for_best_model greater_is_better",
    "`dfl train RECIPE --resume` goes on from the last checkpoint": "resume_from_checkpoint auto_resume_from_checkpoints resume "
        "ignore_data_skip restore_callback_states_from_checkpoint",
    "`dfl train RECIPE --overwrite` replaces a run": "overwrite_output_dir overwrite",
    "`dfl train` trains, `dfl eval` evaluates": "do_train do_predict do_test predict_with_generate",
    # what is always so
    _EVERY_ROUND: "logging_first_step log_on_each_node logging_nan_inf_filter log_level log_level_replica disable_tqdm debug verbose "
        "plot_loss include_num_input_tokens_seen include_tokens_per_second skip_memory_metrics log_with log_completions ",
    "eval.metrics names them, your own as well, over all evaluation examples": "include_for_metrics compute_metrics "
        "compute_accuracy prediction_loss_only",
    "metrics are of all evaluation examples, whatever the batches": "batch_eval_metrics eval_do_concat_batches eval_use_gather_object "
        "eval_accumulation_steps average_tokens_across_devices include_inputs_for_metrics ",
    "every pass over a peer's examples is a new permutation, drawn from the seed": "shuffle shuffle_dataset "
        "train_sampling_strategy length_column_name curriculum_sampling sampler buffer_size mix_strategy "
        "interleave_probs disable_shuffling shuffle_merged_datasets",
    _NO_COLLECTOR: "dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers "
        "dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order remove_unused_columns num_workers "
        "preprocessing_num_workers preprocessing_batch_size dataset_num_proc dataset_processes dataset_batch_size dataset_kwargs "
        "skip_prepare_dataset pad_to_multiple_of pad_to_sequence_len padding padding_side padding_value label_pad_token_id "
        "ignore_pad_token_for_loss data_collator sortish_sampler pretokenized auto_find_batch_size",
    "data.packing is the field for it": "packing_strategy "
        "eval_packing sample_packing neat_packing padding_free multipack_real_batches eval_sample_packing use_logits_to_keep "
        "sample_packing_eff_est flat_packing",
    "data.learn is the field for it; of prompts and responses the responses are learnt": "completion_only_loss "
        "assistant_only_loss train_on_inputs train_on_prompt train_on_input mask_history roles_to_train train_on_eos "
        "dataset_prompt_field ",
    "a long prompt loses its beginning, a long text its end (data.max_length)": "truncation_mode truncation truncation_side "
        "excess_length_strategy",
    _TEMPLATE: "chat_template chat_template_path chat_template_jinja default_system_message tool_format "
        "special_tokens added_tokens_overrides eos_token pad_token bos_token tokens resize_vocab new_special_tokens add_tokens "
        "enable_thinking tokenizer_type tokenizer_config tokenizer_use_fast use_fast_tokenizer processing_class",
    # what there is none of
    _PREFERENCES: "beta dpo_beta pref_beta pref_loss pref_ftx loss_type loss_weights reference_free "
        "ref_model ref_model_init_kwargs ref_adapter_name model_adapter_name precompute_ref_log_probs precompute_ref_batch_size "
        "sync_ref_model ref_model_mixup_alpha ref_model_sync_steps rpo_alpha ld_alpha f_divergence_type f_alpha_divergence_coef "
        "use_weighting discopop_tau disable_dropout force_use_ref_model generate_during_eval rl trl reward_model "
        "simpo_gamma kl_coef dpo_label_smoothing kto_chosen_weight kto_rejected_weight is_encoder_decoder rl_beta "
        "max_new_tokens num_generations desirable_weight undesirable_weight base_model_attribute_name ",
    "noise on embeddings is for a hook of your own: callbacks, with a dfl.Callback that puts it on run.model": "neftune_noise_alpha "
        "noisy_embedding_alpha",
    "the loss is plain cross-entropy": "label_smoothing_factor label_smoothing "
        "router_aux_loss_coef moe_aux_loss_coef class_weights use_focal_loss",
    _PROCESSES: "fsdp fsdp_config fsdp_version deepspeed parallelism_config accelerator_config ddp_find_unused_parameters "
        "ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph local_rank tensor_parallel_size context_parallel_size dp_shard_size "
        "sequence_parallel_degree pipeline_parallel_size device_map gpu_memory_limit world_size num_gpus gpus num_processes "
        "megatron_config megatron_core max_memory lora_on_cpu low_cpu_mem_usage ray_num_workers use_ray",
    "train.gradient_checkpointing is the field for it": "gradient_checkpointing_kwargs activation_checkpointing "
        "activation_checkpointing_kwargs activation_offloading use_cache "
        "torch_empty_cache_steps disable_gradient_checkpointing use_reentrant_gc gradient_checkpointing_reentrant",
    "kernels are those of torch; train.executor trains all peers of a process in one pass": "torch_compile torch_compile_backend "
        "torch_compile_mode use_liger_kernel liger_kernel_config enable_liger_kernel use_unsloth use_kernels jit_mode_eval "
        "lora_mlp_kernel lora_qkv_kernel lora_o_kernel cut_cross_entropy liger_rope liger_rms_norm",
    _ATTENTION: "flash_attention flash_attn flash_attention_2 use_flash_attention_2 sdp_attention "
        "xformers_attention eager_attention flex_attention shift_attn sage_attention s2_attention rope_scaling rope_theta",
    _QUANTISED: "quantization_bit quantization_method quantization_type bnb_4bit_quant_type "
        "use_bnb_nested_quant bnb_4bit_compute_dtype bnb_4bit_use_double_quant quantization_config double_quantization gptq "
        "use_qalora qalora_group_size bnb_config_kwargs qat",
    _HUB: "push_to_hub hub_model_id hub_token hub_strategy hub_private_repo hub_always_push hub_revision hf_hub_token "
        "hub_dataset_id export_dir export_hub_model_id push_to_hub_model_id push_to_hub_token hf_use_auth_token",
    "model.trust_remote_code is the field for it; the code of a data set is never run": "dataset_trust_remote_code ",
    "model.revision is the field for it": "model_revision base_model_revision "
        "model_code_revision dataset_revision",
    "a run begins at the base model; `dfl export --merge` makes a base of an adapter": "adapter_name_or_path lora_model_dir "
        "create_new_adapter inference_mode merge_lora peft_version auto_mapping model_init_kwargs ",
    _ONE_SHAPE: "rank_pattern alpha_pattern lora_bias bias fan_in_fan_out trainable_token_indices ensure_weight_tying "
        "velora_config alora_invocation_tokens monteclora_config runtime_config use_bdlora arrow_config kasa_config "
        "lora_fan_in_fan_out freeze_trainable_layers freeze_extra_modules relora_steps peft_trainable_token_indices ",
}

FOREIGN: dict[str, str] = {name: answer for answer, names in _ANSWERS.items() for name in names.split()}
