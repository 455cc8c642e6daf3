"""Everything of vLLM that `compat` uses: names, attributes, and how functions are called.

`scripts/check_vllm.py` checks a vLLM release against these tables; `tests/unit/test_check_vllm.py` checks that they
match the source of `compat` and its patches. Does not import vLLM.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vllm_ssd.compat.version import SUPPORTED

Minor = tuple[int, ...]

USED = {
    # configuration
    "vllm": "LLMEngine __version__",
    "vllm.envs": "VLLM_USE_V2_MODEL_RUNNER",
    "vllm.config": "CUDAGraphMode ModelConfig SpeculativeConfig VllmConfig set_current_vllm_config",
    "vllm.config:CUDAGraphMode": "FULL FULL_DECODE_ONLY",
    "vllm.config.compilation:CompilationConfig": ("cudagraph_capture_sizes cudagraph_mode max_cudagraph_capture_size"),
    "vllm.config.cache:CacheConfig": "cache_dtype gpu_memory_utilization kv_cache_memory_bytes",
    "vllm.config.device:DeviceConfig": "device_type",
    "vllm.config.model:ModelConfig": (
        "architecture attention_chunk_size dtype get_diff_sampling_param get_head_size get_hidden_size "
        "get_num_kv_heads get_num_layers get_vocab_size hf_config hf_text_config is_attention_free is_encoder_decoder "
        "is_hybrid is_multimodal_model max_model_len model runner_type use_mla uses_alibi uses_mrope"
    ),
    "vllm.config.parallel:ParallelConfig": "data_parallel_index data_parallel_size pipeline_parallel_size",
    "vllm.config.scheduler:SchedulerConfig": "async_scheduling max_num_batched_tokens max_num_seqs",
    "vllm.config.speculative:SpeculativeConfig": (
        "method num_speculative_tokens rejection_sample_method uses_dynamic_speculative_decoding"
    ),
    "vllm.config.vllm:VllmConfig": (
        "additional_config cache_config compilation_config device_config max_concurrent_batches model_config "
        "parallel_config scheduler_config speculative_config structured_outputs_config use_v2_model_runner"
    ),
    "vllm.config.vllm": "HAS_TRITON",
    "vllm.engine.arg_utils": "AsyncEngineArgs EngineArgs",
    "vllm.engine.arg_utils:AsyncEngineArgs": "add_cli_args from_cli_args",
    "vllm.engine.arg_utils:EngineArgs": (
        "create_engine_config create_model_config create_speculative_config language_model_only max_model_len "
        "max_num_batched_tokens max_num_seqs scheduler_cls spec_method speculative_config"
    ),
    "vllm.platforms": "_current_platform current_platform",
    "vllm.platforms.cuda": "NonNvmlCudaPlatform",
    "vllm.platforms.cuda:CudaPlatformBase": "device_count get_device_total_memory",
    "vllm.platforms.interface": "DeviceCapability",
    "vllm.platforms.interface:Platform": "device_control_id_to_physical_device_id is_cpu is_unspecified",
    "vllm.transformers_utils.config": "get_config",
    "vllm.triton_utils": "HAS_TRITON",
    "vllm.utils.argparse_utils": "FlexibleArgumentParser",
    "vllm.v1.attention.selector": "get_attn_backend",
    # both runners
    "vllm.distributed.parallel_state": "get_tp_group",
    "vllm.distributed.parallel_state:GroupCoordinator": "broadcast broadcast_object rank_in_group world_size",
    "vllm.config.structured_outputs:StructuredOutputsConfig": "reasoning_parser",
    "vllm.sampling_params": "SamplingParams",
    "vllm.sampling_params:SamplingParams": (
        "_validate_spec_decode allowed_token_ids extra_args logit_bias max_tokens min_p min_tokens seed "
        "structured_outputs temperature top_k top_p"
    ),
    "vllm.sampling_params:StructuredOutputsParams": "choice grammar",
    "vllm.v1.core.sched.output:CachedRequestData": "all_token_ids",
    "vllm.v1.core.sched.output:NewRequestData": (
        "mm_features prefill_token_ids prompt_embeds prompt_token_ids req_id sampling_params"
    ),
    "vllm.v1.core.sched.output:SchedulerOutput": (
        "finished_req_ids num_scheduled_tokens pending_structured_output_tokens scheduled_cached_reqs "
        "scheduled_new_reqs scheduled_spec_decode_tokens"
    ),
    "vllm.v1.engine:EngineCoreRequest": "cache_salt sampling_params",
    "vllm.v1.engine.core_client": "InprocClient",
    "vllm.v1.engine.core_client:InprocClient": "engine_core",
    "vllm.v1.engine.llm_engine:LLMEngine": "engine_core",
    # the V1 runner
    "vllm.utils.cpu_triton_utils": "",
    "vllm.v1.sample.logits_processor.interface": "MoveDirectionality",
    "vllm.v1.sample.logits_processor.interface:BatchUpdate": "added moved",
    "vllm.v1.sample.logits_processor.interface:MoveDirectionality": "UNIDIRECTIONAL",
    "vllm.v1.sample.metadata": "SamplingMetadata",
    "vllm.v1.sample.metadata:SamplingMetadata": "all_greedy generators logprob_token_ids spec_token_ids",
    "vllm.v1.sample.rejection_sampler": "expand_batch_to_tokens",
    "vllm.v1.sample.sampler:Sampler": "forward topk_topp_sampler",
    "vllm.v1.sample.thinking_budget_state": "ThinkingBudgetStateHolder",
    "vllm.v1.sample.thinking_budget_state:ThinkingBudgetStateHolder": (
        "_state _update_think_state apply_to_logits sync_batch think_end_token_ids update_state"
    ),
    "vllm.v1.spec_decode.metadata": "SpecDecodeMetadata",
    "vllm.v1.spec_decode.metadata:SpecDecodeMetadata": "bonus_logits_indices draft_token_ids num_draft_tokens",
    "vllm.v1.worker.gpu_input_batch:CachedRequestState": "num_prompt_tokens output_token_ids sampling_params",
    "vllm.v1.worker.gpu_input_batch:InputBatch": (
        "num_prompt_tokens num_tokens_no_spec req_ids sampling_metadata spec_token_ids thinking_budget_state_holder "
        "update_async_output_token_ids vocab_size"
    ),
    "vllm.v1.worker.gpu_model_runner": "GPUModelRunner",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner": (
        "_get_spec_decode_draft_probs _input_fits_in_drafter _sample _update_states attn_groups device drafter "
        "execute_model initialize_kv_cache input_batch kv_cache_config kv_caches model propose_draft_token_ids "
        "requests sampler vllm_config"
    ),
    # the V2 runner
    "vllm.v1.core.sched.async_scheduler": "AsyncScheduler",
    "vllm.v1.core.sched.scheduler": "Scheduler",
    "vllm.v1.core.sched.output:GrammarOutput": "num_acceptable_drafts structured_output_request_ids",
    "vllm.v1.core.sched.scheduler:Scheduler": "dynamic_sd_lookup num_spec_tokens parallel_config update_from_output",
    "vllm.v1.outputs:ModelRunnerOutput": "req_id_to_index sampled_token_ids",
    "vllm.v1.worker.gpu.buffer_utils:StagedWriteTensor": "gpu",
    "vllm.v1.worker.gpu.cudagraph_utils": "CudaGraphManager",
    "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager": "_candidates _capture_descs _init_candidates vllm_config",
    "vllm.v1.worker.gpu.cudagraph_utils:BatchExecutionDescriptor": (
        "num_active_loras num_tokens num_ubatches uniform_token_count"
    ),
    "vllm.v1.worker.gpu.buffer_utils:UvaBackedTensor": "np",
    "vllm.v1.worker.gpu.lora_utils:LoraState": "make_lora_inputs",
    "vllm.v1.worker.gpu.input_batch:InputBatch": (
        "expanded_idx_mapping expanded_local_pos idx_mapping idx_mapping_np num_draft_tokens_per_req num_reqs req_ids"
    ),
    "vllm.v1.worker.gpu.model_runner": "GPUModelRunner init_speculator",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner": (
        "_remove_request add_requests device finish_requests load_model lora_state rejection_sampler req_states "
        "sample_tokens sampler speculator vllm_config"
    ),
    "vllm.v1.worker.gpu.spec_decode": "init_speculator",
    "vllm.v1.worker.gpu.spec_decode.ngram": "",
    "vllm.v1.worker.gpu.spec_decode.ngram.speculator": "NgramGPUSpeculator",
    "vllm.v1.worker.gpu.spec_decode.ngram.speculator:NgramGPUSpeculator": "propose",
    "vllm.v1.worker.gpu.spec_decode.rejection_sampler": "RejectionSampler",
    "vllm.v1.worker.gpu.spec_decode.rejection_sampler:RejectionSampler": "__call__",
    "vllm.v1.worker.gpu.sample.gumbel": "gumbel_sample",
    "vllm.v1.worker.gpu.sample.sampler": "Sampler",
    "vllm.v1.worker.gpu.sample.sampler:Sampler": "sampling_states use_fp64_gumbel",
    "vllm.v1.worker.gpu.sample.states:SamplingStates": "seeds temperature",
    "vllm.v1.worker.gpu.spec_decode.speculator": "BaseSpeculator",
    "vllm.v1.worker.gpu.spec_decode.speculator:BaseSpeculator": "capture init_cudagraph_manager propose",
    "vllm.v1.worker.gpu.states:RequestState": "free_indices last_sampled_tokens req_id_to_index total_len",
    # the drafter
    "vllm._custom_ops": "reshape_and_cache_flash",
    "vllm.forward_context": "set_forward_context",
    "vllm.model_executor.layers.layernorm": "RMSNorm",
    "vllm.model_executor.layers.layernorm:RMSNorm": (
        "forward_cpu forward_native has_weight register_oot variance_epsilon variance_size_override weight"
    ),
    "vllm.tokenizers": "cached_tokenizer_from_config",
    "vllm.tokenizers.protocol:TokenizerLike": "convert_ids_to_tokens get_vocab",
    "vllm.v1.attention.backend": (
        "AttentionBackend AttentionCGSupport AttentionImpl AttentionLayer AttentionMetadata AttentionMetadataBuilder "
        "AttentionType CommonAttentionMetadata MultipleOf"
    ),
    "vllm.v1.attention.backend:AttentionBackend": (
        "get_builder_cls get_impl_cls get_name get_supported_kernel_block_sizes supports_head_size "
        "supports_sliding_window"
    ),
    "vllm.v1.attention.backend:AttentionCGSupport": "NEVER",
    "vllm.v1.attention.backend:AttentionImpl": "__init__ forward",
    "vllm.v1.attention.backend:AttentionLayer": "_k_scale _v_scale",
    "vllm.v1.attention.backend:AttentionMetadataBuilder": (
        "__init__ build build_for_cudagraph_capture device get_cudagraph_support kv_cache_spec layer_names"
    ),
    "vllm.v1.attention.backend:AttentionType": "DECODER",
    "vllm.v1.attention.backend:CommonAttentionMetadata": (
        "block_table_tensor max_query_len max_seq_len num_actual_tokens num_reqs query_start_loc seq_lens"
    ),
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl": "do_kv_cache_update",
    "vllm.v1.attention.backends.registry": "AttentionBackendEnum register_backend",
    "vllm.v1.engine.core": "EngineCore",
    "vllm.v1.engine.core:EngineCore": "model_executor scheduler vllm_config",
    "vllm.v1.executor.uniproc_executor": "UniProcExecutor",
    "vllm.v1.executor.uniproc_executor:UniProcExecutor": "driver_worker",
    "vllm.v1.kv_cache_interface:KVCacheConfig": "kv_cache_groups num_blocks",
    "vllm.v1.kv_cache_interface:KVCacheGroupSpec": "kv_cache_spec",
    "vllm.v1.kv_cache_interface:KVCacheSpec": "block_size",
    "vllm.utils.mem_utils:MemorySnapshot": "cuda_memory free_memory non_torch_memory",
    "vllm.v1.worker.gpu_worker": "Worker",
    "vllm.v1.worker.gpu_worker:Worker": (
        "determine_available_memory finish_weight_update init_snapshot model_runner reload_weights sleep vllm_config "
        "wake_up"
    ),
    "vllm.v1.worker.utils:AttentionGroup": "get_metadata_builder layer_names",
    "vllm.v1.worker.worker_base:WorkerWrapperBase": "worker",
}
"""Names in modules, and attributes of classes, including those set by base classes or in methods on `self`."""

CALLED = {
    "vllm._custom_ops:reshape_and_cache_flash": (
        "key value key_cache value_cache slot_mapping kv_cache_dtype k_scale v_scale"
    ),
    "vllm.engine.arg_utils:EngineArgs": (
        "block_size enable_prefix_caching disable_log_stats disable_hybrid_kv_cache_manager model dtype enforce_eager"
    ),
    "vllm.transformers_utils.config:get_config": "model trust_remote_code revision",
    "vllm.forward_context:set_forward_context": "attn_metadata vllm_config num_tokens slot_mapping skip_compiled",
    "vllm.distributed.parallel_state:GroupCoordinator.broadcast": "input_ src",
    "vllm.distributed.parallel_state:GroupCoordinator.broadcast_object": "obj src",
    "vllm.model_executor.layers.layernorm:RMSNorm.register_oot": "_decorated_op_cls name",
    "vllm.tokenizers:cached_tokenizer_from_config": "model_config",
    "vllm.v1.attention.backend:CommonAttentionMetadata": (
        "query_start_loc query_start_loc_cpu seq_lens num_reqs num_actual_tokens max_query_len max_seq_len "
        "block_table_tensor slot_mapping positions seq_lens_cpu_upper_bound"
    ),
    "vllm.v1.sample.sampler:Sampler.forward": "logits sampling_metadata predict_bonus_token",
    "vllm.v1.attention.backends.registry:register_backend": "backend class_path",
    "vllm.v1.attention.selector:get_attn_backend": "head_size dtype kv_cache_dtype use_mla",
    "vllm.v1.engine.core:EngineCore": "vllm_config executor_class log_stats",
    "vllm.v1.worker.gpu.spec_decode.ngram.speculator:NgramGPUSpeculator": "vllm_config device req_states",
    "vllm.v1.worker.gpu.model_runner:init_speculator": "vllm_config device req_states",
    "vllm.v1.worker.gpu.sample.gumbel:gumbel_sample": (
        "logits expanded_idx_mapping temperature seed pos apply_temperature is_drafting use_fp64"
    ),
    "vllm.v1.worker.gpu.spec_decode:init_speculator": "vllm_config device req_states",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.execute_model": "scheduler_output intermediate_tensors",
    "vllm.v1.worker.gpu_worker:Worker.sleep": "level",
    "vllm.v1.worker.gpu_worker:Worker.wake_up": "tags",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.propose_draft_token_ids": (
        "scheduler_output sampled_token_ids sampling_metadata hidden_states sample_hidden_states aux_hidden_states "
        "spec_decode_metadata common_attn_metadata slot_mappings"
    ),
}
"""Parameters that our calls or wrappers pass: all of them must exist, and no other may be required."""

EXACT = {
    "vllm.config.vllm:VllmConfig.max_concurrent_batches": "",
    "vllm.engine.arg_utils:EngineArgs.create_speculative_config": "target_model_config target_parallel_config",
    "vllm.v1.attention.backend:AttentionBackend.supports_head_size": "head_size",
    "vllm.v1.attention.backend:AttentionBackend.supports_sliding_window": "",
    "vllm.v1.attention.backend:AttentionImpl.__init__": (
        "num_heads head_size scale num_kv_heads alibi_slopes sliding_window kv_cache_dtype logits_soft_cap attn_type "
        "kv_sharing_target_layer_name"
    ),
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.do_kv_cache_update": (
        "layer key value kv_cache slot_mapping"
    ),
    "vllm.v1.attention.backend:AttentionImpl.forward": (
        "layer query key value kv_cache attn_metadata output output_scale output_block_scale"
    ),
    "vllm.v1.attention.backend:AttentionMetadataBuilder.__init__": "kv_cache_spec layer_names vllm_config device",
    "vllm.v1.attention.backend:AttentionMetadataBuilder.build": ("common_prefix_len common_attn_metadata fast_build"),
    "vllm.sampling_params:SamplingParams._validate_spec_decode": "speculative_config",
    "vllm.v1.engine.core:EngineCore.preprocess_add_request": "request",
    "vllm.v1.core.sched.scheduler:Scheduler.update_from_output": "scheduler_output model_runner_output",
    "vllm.v1.sample.rejection_sampler:expand_batch_to_tokens": "x cu_num_tokens num_tokens replace_from replace_to",
    "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager._init_candidates": "",
    "vllm.v1.worker.gpu.lora_utils:LoraState.make_lora_inputs": "req_ids idx_mapping num_scheduled_tokens",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner._remove_request": "req_id",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.add_requests": "scheduler_output",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.finish_requests": "scheduler_output",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.sample_tokens": "grammar_output",
    "vllm.v1.worker.gpu.spec_decode.rejection_sampler:RejectionSampler.__call__": (
        "logits input_batch draft_logits invalid_drafts"
    ),
    "vllm.v1.worker.gpu.spec_decode.speculator:BaseSpeculator.capture": "",
    "vllm.v1.worker.gpu.spec_decode.speculator:BaseSpeculator.init_cudagraph_manager": "cudagraph_mode",
    "vllm.v1.worker.gpu.spec_decode.speculator:BaseSpeculator.propose": (
        "input_batch attn_metadata slot_mappings last_hidden_states aux_hidden_states num_sampled num_rejected "
        "last_sampled next_prefill_tokens temperature seeds dp_sync_state dummy_run skip_attn_for_dummy_run mm_inputs "
        "is_profile num_speculative_tokens"
    ),
    "vllm.v1.worker.gpu.spec_decode.ngram.speculator:NgramGPUSpeculator.propose": (
        "input_batch attn_metadata slot_mappings last_hidden_states aux_hidden_states num_sampled num_rejected "
        "last_sampled next_prefill_tokens temperature seeds dp_sync_state dummy_run skip_attn_for_dummy_run mm_inputs "
        "is_profile num_speculative_tokens"
    ),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._get_spec_decode_draft_probs": "spec_decode_metadata",
    "vllm.v1.sample.thinking_budget_state:ThinkingBudgetStateHolder._update_think_state": "state",
    "vllm.v1.sample.thinking_budget_state:ThinkingBudgetStateHolder.apply_to_logits": (
        "logits predict_bonus_token spec_token_ids"
    ),
    "vllm.v1.sample.thinking_budget_state:ThinkingBudgetStateHolder.sync_batch": "batch_update",
    "vllm.v1.sample.thinking_budget_state:ThinkingBudgetStateHolder.update_state": (
        "output_token_ids spec_token_ids repeat_indices"
    ),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._input_fits_in_drafter": "common_attn_metadata",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._sample": "logits spec_decode_metadata",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._update_states": "scheduler_output",
}
"""All parameters but `self` of functions that ours replace, which vLLM calls with these."""

SUBCLASSED = {
    "vllm.v1.attention.backend:AttentionBackend": "get_builder_cls get_impl_cls get_name",
    "vllm.v1.attention.backend:AttentionImpl": "__init__ forward",
    "vllm.v1.attention.backend:AttentionMetadataBuilder": "__init__ build",
    "vllm.v1.worker.gpu.spec_decode.speculator:BaseSpeculator": "capture init_cudagraph_manager propose",
}
"""Abstract methods of base classes that our subclasses implement; no others may be abstract."""

FROM_0_32 = (
    "vllm.v1.core.sched.output:GrammarOutput",
    "vllm.v1.core.sched.output:SchedulerOutput.pending_structured_output_tokens",
    "vllm.config.speculative:SpeculativeConfig.uses_dynamic_speculative_decoding",
    "vllm.platforms.interface:Platform.is_unspecified",
    "vllm.v1.core.sched.scheduler:Scheduler",
    "vllm.v1.outputs:",
    "vllm.v1.worker.gpu.",
)
"""Prefixes of symbols that are only used from 0.32 on, with the V2 runner."""
UP_TO_0_31 = {
    "vllm.v1.worker.gpu.model_runner:init_speculator": "vllm_config device",
    "vllm.v1.worker.gpu.spec_decode:init_speculator": "vllm_config device",
}
"""Parameters before 0.32 of symbols that gained some in 0.32."""


@dataclass(frozen=True)
class Symbol:
    """A symbol of vLLM: "module:Class.attribute", "module:name", or a module.

    parameters: of a function, None if they do not matter; exact: whether the function must have no others; implemented:
    abstract methods that our subclass implements, None without a subclass.
    """

    name: str
    parameters: tuple[str, ...] | None = None
    exact: bool = False
    implemented: tuple[str, ...] | None = None


def symbols(minor: Minor = SUPPORTED[1]) -> Iterator[Symbol]:
    """The symbols that are used with this vLLM minor, in the order of the tables."""
    names = [
        f"{owner}{'.' if ':' in owner else ':'}{name}" if name else owner
        for owner, found in USED.items()
        for name in found.split() or [""]
    ]
    for name in dict.fromkeys([*names, *CALLED, *EXACT]):
        before = minor < (0, 32)
        if before and name.startswith(FROM_0_32) and name not in UP_TO_0_31:
            continue
        parameters, implemented = EXACT.get(name, CALLED.get(name)), SUBCLASSED.get(name)
        if before:
            parameters = UP_TO_0_31.get(name, parameters)
        yield Symbol(name, _split(parameters), name in EXACT, _split(implemented))


def _split(names: str | None) -> tuple[str, ...] | None:
    return None if names is None else tuple(names.split())
