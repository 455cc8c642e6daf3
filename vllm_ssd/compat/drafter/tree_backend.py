"""A vLLM attention backend that reads the trunk shared by a request's branches only once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionLayer,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from vllm_ssd.compat.drafter.paged import TreeBatch
from vllm_ssd.kernels import tree_attention
from vllm_ssd.kernels.dispatch import use_triton


def register() -> str:
    """Register this backend with vLLM in this process; returns its name.

    vLLM's CPU platform only accepts `CPU_ATTN`, so there the class behind that name is replaced.
    """
    name = TreeAttentionBackend.get_name()
    backend = cast(AttentionBackendEnum, AttentionBackendEnum[name])
    register_backend(backend, f"{__name__}.{TreeAttentionBackend.__qualname__}")
    return name


@dataclass
class TreeAttentionMetadata(AttentionMetadata):
    """The arguments of `kernels.tree_attention` that do not depend on the layer."""

    page_tables: torch.Tensor
    query_start_loc: torch.Tensor
    shared_lens: torch.Tensor
    own_pages: torch.Tensor
    own_lens: torch.Tensor
    max_shared_len: int
    max_rows: int
    num_actual_tokens: int

    @classmethod
    def from_batch(cls, batch: TreeBatch) -> TreeAttentionMetadata:
        """The metadata of one step of the drafter's trees."""
        return cls(
            batch.page_tables,
            batch.query_start_loc,
            batch.shared_lens,
            batch.own_pages,
            batch.own_lens,
            batch.max_shared_len,
            batch.max_rows,
            len(batch.token_ids),
        )


class TreeAttentionMetadataBuilder(AttentionMetadataBuilder[TreeAttentionMetadata]):
    """Builds metadata for vLLM's own batches, as in its warm-up: trees without branches."""

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> TreeAttentionMetadata:
        """Metadata with which every token reads its request's pages up to itself."""
        batch = common_attn_metadata
        starts, num_tokens = batch.query_start_loc[: batch.num_reqs + 1], batch.num_actual_tokens
        query_lens = starts.diff()
        before = batch.seq_lens[: batch.num_reqs] - query_lens - starts[:-1]
        token = torch.arange(1, num_tokens + 1, dtype=torch.int32, device=self.device)
        shared_lens = token + before.int().repeat_interleave(query_lens, output_size=num_tokens)
        nothing = torch.zeros(num_tokens, 1, dtype=torch.int32, device=self.device)
        return TreeAttentionMetadata(
            batch.block_table_tensor,
            starts,
            shared_lens,
            nothing,
            nothing[:, 0].contiguous(),
            batch.max_seq_len,
            batch.max_query_len,
            num_tokens,
        )


CHUNKED, LATENT = "chunked attention", "latent keys"
OTHERS = {"ChunkedLocal": CHUNKED, "MLA": LATENT}
"""Unsupported feature of a layer with another backend, by the prefix of its metadata builder's class name."""
MAX_HEAD_SIZE = 256
SINK_KEYS = ("attention_sinks", "add_swa_attention_sink_bias", "swa_attention_sink_enabled")
"""Keys of config.json that enable attention sinks; architectures in `ALWAYS_SINKS` have them without a key."""
ALWAYS_SINKS = {"GptOssForCausalLM", "GraniteSWAForCausalLM", "GraniteMoeSWAForCausalLM"}


def unsupported(
    *,
    alibi: bool = False,
    sinks: bool = False,
    kv_cache_dtype: str = "auto",
    attn_type: str = AttentionType.DECODER,
    chunked: bool = False,
    latent: bool = False,
    head_size: int = 1,
) -> list[str]:
    """Names of the features that this backend does not support; [] if it supports all."""
    features = {
        "ALiBi": alibi,
        "attention sinks": sinks,
        f"a {kv_cache_dtype} KV cache": kv_cache_dtype not in ("auto", "float16", "bfloat16", "float32"),
        f"{attn_type} attention": attn_type != AttentionType.DECODER,
        CHUNKED: chunked,
        LATENT: latent,
        f"a head size of {head_size}": head_size > MAX_HEAD_SIZE,
    }
    return [feature for feature, wanted in features.items() if wanted]


def unsupported_by_config(vllm_config: VllmConfig) -> list[str]:
    """Like `unsupported`, for a draft model that is not loaded, as far as its configuration shows."""
    model = vllm_config.model_config
    keys = [getattr(model.hf_text_config, key, None) for key in SINK_KEYS]
    has_key = any(key is not None for key in keys)
    return unsupported(
        alibi=model.uses_alibi,
        sinks=any(keys) if has_key else model.architecture in ALWAYS_SINKS,
        kv_cache_dtype=vllm_config.cache_config.cache_dtype,
        chunked=bool(model.attention_chunk_size),
        latent=model.use_mla,
        head_size=model.get_head_size(),
    )


def check_builders(builders: list[AttentionMetadataBuilder]) -> None:
    """Raise NotImplementedError if vLLM uses another backend for some layers, or wraps this one."""
    for builder in builders:
        if type(builder) is not TreeAttentionMetadataBuilder:
            name = type(builder).__name__
            feature = next((words for prefix, words in OTHERS.items() if name.startswith(prefix)), name)
            raise NotImplementedError(f"the drafter's tree attention does not support {feature}")


class TreeAttentionImpl(AttentionImpl[TreeAttentionMetadata]):
    """Attention of one layer, over a cache `[P, num_kv_heads, page_size, 2 * head_size]`, keys first."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        refused = unsupported(
            alibi=alibi_slopes is not None,
            sinks=sinks is not None,
            kv_cache_dtype=kv_cache_dtype,
            attn_type=attn_type,
        )
        if refused:
            raise NotImplementedError(f"the drafter's tree attention does not support {refused[0]}")
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_size = head_size
        self.scale = scale
        self.sliding_window = sliding_window or 0
        self.soft_cap = logits_soft_cap or 0.0
        self.kv_cache_dtype = kv_cache_dtype
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name

    def do_kv_cache_update(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write keys and values `[T, num_kv_heads, head_size]` to their slots; negative slots are skipped."""
        key_cache, value_cache = split_cache(kv_cache)
        if kv_cache.is_cuda and use_triton(kv_cache):
            from vllm._custom_ops import reshape_and_cache_flash

            reshape_and_cache_flash(
                key, value, key_cache, value_cache, slot_mapping, self.kv_cache_dtype, layer._k_scale, layer._v_scale
            )
            return
        written = torch.nonzero(slot_mapping >= 0)[:, 0]
        page, offset = slot_mapping[written] // key_cache.shape[1], slot_mapping[written] % key_cache.shape[1]
        key_cache[page, offset] = key[written]
        value_cache[page, offset] = value[written]

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: TreeAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Fill `output` `[T, num_heads, head_size]`; with zeros if there is no metadata (memory profiling)."""
        if attn_metadata is None:
            return output.fill_(0)
        n = attn_metadata.num_actual_tokens
        tree_attention(
            query[:n],
            *split_cache(kv_cache),
            attn_metadata.page_tables,
            attn_metadata.query_start_loc,
            attn_metadata.shared_lens,
            attn_metadata.own_pages,
            attn_metadata.own_lens,
            scale=self.scale,
            max_shared_len=attn_metadata.max_shared_len,
            max_rows=attn_metadata.max_rows,
            sliding_window=self.sliding_window,
            soft_cap=self.soft_cap,
            out=output[:n],
        )
        return output


class TreeAttentionBackend(AttentionBackend):
    """The backend, registered in place of `CPU_ATTN` on a CPU and as `CUSTOM` on a GPU."""

    forward_includes_kv_cache_update = False
    supported_dtypes = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_name() -> str:
        return "CPU_ATTN" if current_platform.is_cpu() else "CUSTOM"

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return not unsupported(head_size=head_size)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @staticmethod
    def get_impl_cls() -> type[TreeAttentionImpl]:
        return TreeAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[TreeAttentionMetadataBuilder]:
        return TreeAttentionMetadataBuilder


def split_cache(kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the keys and of the values, each `[P, page_size, num_kv_heads, head_size]`."""
    keys, values = kv_cache.transpose(1, 2).chunk(2, dim=-1)
    return keys, values
