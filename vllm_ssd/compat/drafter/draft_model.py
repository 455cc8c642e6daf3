"""A draft model that vLLM loads, but does not schedule.

vLLM's `EngineCore` on the uniprocess executor loads and quantises the model, sizes its KV pages and lays them out. This
module then runs single forwards on pages and slots that the caller chooses.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from vllm.config import ModelConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from vllm_ssd.compat.drafter import tree_backend
from vllm_ssd.compat.drafter.cpu_norms import use_compiled_norms
from vllm_ssd.compat.drafter.decode_graphs import DecodeGraphs, capturing_builders, metadata_by_layer
from vllm_ssd.compat.drafter.graphs import Graphs, graphs_on
from vllm_ssd.compat.drafter.memory import bytes_a_row, executor_with_reserve, explained, max_rows
from vllm_ssd.compat.drafter.paged import ForwardBatch, TreeBatch, UnsupportedDraftModel
from vllm_ssd.compat.prefix_lm import PREFIX_LMS
from vllm_ssd.compat.vocabulary import read_vocabulary
from vllm_ssd.kernels import copy_pages

logger = logging.getLogger("vllm.vllm_ssd")

PAGE_SIZE = 32
"""Tokens per page: the smallest size that vLLM's CPU attention supports, to copy little on a fork."""
WHO_CAN_DRAFT = (
    "a draft model is a decoder with attention in every layer (full, sliding or chunked; dense or mixture of experts)"
)
MASK_KEYS = ("pard_token", "ptd_token_id")
"""Keys of config.json that mark a parallel draft model, in vLLM's order. vLLM also reads others after these, such as
mask_token_id, but they occur in other models, too."""
DEFAULT_BATCH_TOKENS = 2048
"""vLLM's default max_num_batched_tokens, which max_num_seqs must not exceed."""


def draft_config(tree_attention: bool, target_max_model_len: int | None, engine_args: dict[str, Any]) -> VllmConfig:
    """Build vLLM's configuration of a draft model; reads its configuration files, but loads no weights."""
    if tree_attention:
        engine_args = engine_args | {"attention_backend": tree_backend.register()}
    if not engine_args.get("enforce_eager"):  # compile the model, but leave CUDA graphs to our own capture
        engine_args.setdefault("compilation_config", {"cudagraph_mode": "NONE"})
    args = EngineArgs(
        block_size=PAGE_SIZE,
        enable_prefix_caching=False,
        disable_log_stats=True,
        disable_hybrid_kv_cache_manager=True,  # one page layout for layers with and without a window
        **engine_args,
    )
    if args.max_num_seqs is not None and args.max_num_seqs > DEFAULT_BATCH_TOKENS:
        args.max_num_batched_tokens = max(args.max_num_batched_tokens or 0, args.max_num_seqs)
    model_config = args.create_model_config()
    refuse_state(model_config)
    mask_token_id(model_config)
    if model_config.is_multimodal_model:
        args.language_model_only = True  # drafts are text: do not load vision and audio encoders
    if args.max_model_len is None and target_max_model_len is not None:  # no request will be longer
        args.max_model_len = min(model_config.max_model_len, target_max_model_len)
    return args.create_engine_config()


class DraftModel:
    """The loaded draft model and its KV pages.

    Runs either with vLLM's attention on sequences with page tables, or, with `tree_attention`, on token trees.
    """

    def __init__(
        self,
        *,
        tree_attention: bool = False,
        target_max_model_len: int | None = None,
        num_branches: int = 0,
        num_drafts: int = 1,
        **engine_args,
    ) -> None:
        self.vllm_config = draft_config(tree_attention, target_max_model_len, engine_args)
        config = self.vllm_config.model_config
        self.vocab_size, self.dtype = config.get_vocab_size(), config.dtype
        self.mask_token_id = mask_token_id(config)
        if self.mask_token_id is not None:
            num_branches *= num_drafts  # a step computes logits for all drafts
            logger.info("SSD: the draft model drafts in parallel, with mask token %d", self.mask_token_id)
        rows = min(num_branches, max_rows(self.vocab_size, self.dtype))
        self.logit_bytes = rows * bytes_a_row(self.vocab_size, self.dtype)
        if self.vllm_config.device_config.device_type == "cpu":
            use_compiled_norms()
        with _own_temporary_folder():
            try:
                self._core = EngineCore(self.vllm_config, executor_with_reserve(self.logit_bytes), log_stats=False)
            except ValueError as error:
                raise explained(error, self.vllm_config) from error
        runner = _runner_of(self._core)
        groups = runner.kv_cache_config.kv_cache_groups
        if len(groups) != 1 or not runner.kv_caches:
            raise UnsupportedDraftModel(
                f"the draft model {config.model} has {len(groups)} groups of KV pages that vLLM cannot lay out "
                f"as one, so it cannot draft; {WHO_CAN_DRAFT}"
            )
        self._model = runner.model
        self.tree_attention = tree_attention
        # Layers with full and with chunked attention share pages, but have separate metadata.
        self._attention_groups = [(group.layer_names, group.get_metadata_builder()) for group in runner.attn_groups[0]]
        if tree_attention:
            tree_backend.check_builders([builder for _, builder in self._attention_groups])
        self._layer_names = [name for names, _ in self._attention_groups for name in names]
        self._position_rows = 3 if config.uses_mrope else None
        self._decode_graphs: DecodeGraphs | None = None
        self.device = runner.device
        self.page_size = groups[0].kv_cache_spec.block_size
        self.num_pages = runner.kv_cache_config.num_blocks
        self._kv_caches = [half for cache in runner.kv_caches for half in _split_by_page(cache, self.num_pages)]
        on_host = all(cache.device.type == "cpu" and cache.is_contiguous() for cache in self._kv_caches)
        self._host_pages = [_host_pages(cache) for cache in self._kv_caches] if on_host else []
        self._key_value_views = [
            view for cache in runner.kv_caches if tree_attention for view in tree_backend.split_cache(cache)
        ]
        self.weight_bytes = sum(weight.nbytes for weight in self._model.parameters())
        self.kv_bytes = sum(cache.nbytes for cache in runner.kv_caches)
        if self.device.type == "cuda":  # reserve the memory in PyTorch's allocator, so that nobody else takes it
            torch.empty(self.logit_bytes, dtype=torch.uint8, device=self.device)
        self.max_model_len = self.vllm_config.model_config.max_model_len
        self.max_num_tokens = self.vllm_config.scheduler_config.max_num_batched_tokens

    def warm_up(self, sizes: Sequence[int], graphs: Graphs | None = None) -> int:
        """See `PagedModel.warm_up`; only captures with vLLM's attention, and on a GPU or if `graphs` is given."""
        if self.tree_attention or (graphs is None and self.device.type != "cuda"):
            return 0
        if self._decode_graphs is not None:  # captured already, for another engine of this model
            return len(sizes)
        groups = capturing_builders(self._attention_groups, self.vllm_config, sizes)
        if groups is None:
            logger.warning(
                "SSD: vLLM's attention backend for the drafter does not support CUDA graphs; its steps run eagerly"
            )
            return 0
        self._decode_graphs = DecodeGraphs(
            self._hidden_states,
            groups,
            sizes,
            self.vllm_config.model_config.get_hidden_size(),
            self.dtype,
            self.page_size,
            self.max_model_len,
            graphs or graphs_on(self.device),
        )
        return self._decode_graphs.capture()

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch | TreeBatch) -> torch.Tensor:
        """Logits `[n, vocab]` at `batch.logit_indices`; writes the KV of every token to its slot.

        A `TreeBatch` requires a model that was loaded with tree attention.
        """
        if isinstance(batch, TreeBatch):
            metadata = dict.fromkeys(self._layer_names, tree_backend.TreeAttentionMetadata.from_batch(batch))
            return self._run(metadata, batch.token_ids, batch.positions, batch.slots, batch.logit_indices)
        to_device = self._to_device
        replayed = self._decode_graphs.hidden_states(batch) if self._decode_graphs else None
        if replayed is not None:
            return self._model.compute_logits(replayed[to_device(batch.logit_indices)])
        num_tokens = len(batch.token_ids)
        query_lens = np.diff(batch.query_start_loc)
        positions = to_device(batch.positions)
        slots = to_device(batch.slots)
        query_start_loc_cpu = torch.from_numpy(batch.query_start_loc)
        common = CommonAttentionMetadata(
            query_start_loc=to_device(batch.query_start_loc),
            query_start_loc_cpu=query_start_loc_cpu,
            seq_lens=to_device(batch.seq_lens),
            num_reqs=len(batch.seq_lens),
            num_actual_tokens=num_tokens,
            max_query_len=int(query_lens.max()),
            max_seq_len=int(batch.seq_lens.max()),
            block_table_tensor=to_device(batch.page_tables),
            slot_mapping=slots,
            positions=positions,
            seq_lens_cpu_upper_bound=torch.from_numpy(batch.seq_lens),
        )
        metadata = metadata_by_layer(self._attention_groups, lambda builder: builder.build(0, common))
        all_logits = len(batch.logit_indices) == num_tokens
        logit_indices = None if all_logits else to_device(batch.logit_indices)
        return self._run(metadata, to_device(batch.token_ids), positions, slots, logit_indices)

    def _run(
        self,
        metadata: dict[str, Any],
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        logit_indices: torch.Tensor | None,
    ) -> torch.Tensor:
        hidden_states = self._hidden_states(metadata, token_ids, positions, slots)
        return self._model.compute_logits(hidden_states if logit_indices is None else hidden_states[logit_indices])

    @torch.inference_mode()
    def _hidden_states(
        self, metadata: dict[str, Any], token_ids: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor
    ) -> torch.Tensor:
        if self._position_rows is not None:  # M-RoPE: for text, temporal, height and width positions are equal
            positions = positions.expand(self._position_rows, -1)
        with set_forward_context(
            metadata,
            self.vllm_config,
            num_tokens=len(token_ids),
            slot_mapping=dict.fromkeys(self._layer_names, slots),
            skip_compiled=len(token_ids) > self.max_num_tokens,  # beyond what vLLM compiles for
        ):
            return self._model(token_ids, positions)

    def copy_pages(self, sources: list[int], destinations: list[int]) -> None:
        """Copy whole pages in every layer, from page ids `sources` to `destinations`."""
        for pages in self._host_pages:
            pages[destinations] = pages[sources]
        if not self._host_pages:
            source = self._to_device(np.asarray(sources, np.int64))
            destination = self._to_device(np.asarray(destinations, np.int64))
            for cache in self._kv_caches:
                cache.index_copy_(0, destination, cache.index_select(0, source))

    def copy_slots(self, sources: torch.Tensor, destinations: torch.Tensor, num_slots: torch.Tensor) -> None:
        """Copy the first slots of pages in every layer; see `kernels.copy_pages`."""
        copy_pages(self._key_value_views, sources, destinations, num_slots)

    def vocabulary(self) -> tuple[list[str], int]:
        """The string of each token id, and the id of a stand-in for unknown tokens."""
        return read_vocabulary(self.vllm_config.model_config)

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)


def refuse_state(model_config: ModelConfig) -> None:
    """Raise UnsupportedDraftModel for models with recurrent state, prefix LMs, encoder-decoders and pooling models.

    Branches of a tree cannot share a recurrent state, nor roll it back to their fork point. In a prefix LM,
    tokens attend to later ones.
    """
    what = None
    if model_config.is_hybrid or model_config.is_attention_free:
        what = "has recurrent or linear-attention layers, whose state branches cannot share"
    elif model_config.architecture in PREFIX_LMS:
        what = "is a prefix LM, whose tokens attend to later ones"
    elif model_config.is_encoder_decoder:
        what = "is an encoder-decoder"
    elif model_config.runner_type != "generate":
        what = "is a pooling model"
    if what is not None:
        name = f"{model_config.model} ({model_config.architecture})"
        raise UnsupportedDraftModel(f"the draft model {name} {what}, so it cannot draft; {WHO_CAN_DRAFT}")


def mask_token_id(model_config: ModelConfig) -> int | None:
    """The mask token of a parallel draft model (PARD); None for other models.

    Raises UnsupportedDraftModel if the token is outside the model's vocabulary.
    """
    config = model_config.hf_config
    for key in MASK_KEYS:
        token_id = getattr(config, key, None)
        if token_id is None:
            continue
        size = model_config.get_vocab_size()
        if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id < size:
            raise UnsupportedDraftModel(
                f"the draft model {model_config.model} cannot draft in parallel: its config.json has {key} = "
                f"{token_id!r}, which is not one of its {size} token ids"
            )
        return token_id
    return None


def _runner_of(core: EngineCore) -> Any:
    """The model runner, which is in this process."""
    return cast(UniProcExecutor, core.model_executor).driver_worker.worker.model_runner


def _split_by_page(cache: torch.Tensor, num_pages: int) -> Sequence[torch.Tensor]:
    """Views of a layer's KV with the page as first axis; some backends have a key/value axis before it."""
    return [cache] if cache.shape[0] == num_pages else cache.unbind(0)


def _host_pages(cache: torch.Tensor) -> np.ndarray:
    """A layer's KV in host memory as `[pages]` opaque items, which copy six times as fast as PyTorch's indexing."""
    pages = cache.flatten(1).view(torch.uint8).numpy()
    return pages.view(np.dtype((np.void, pages.shape[1])))[:, 0]


@contextmanager
def _own_temporary_folder() -> Iterator[None]:
    """Put torch.distributed's rendezvous file into a private folder, as a killed drafter would leave it behind."""
    outside = tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix="vllm-ssd-") as folder:
        tempfile.tempdir = folder
        try:
            yield
        finally:
            tempfile.tempdir = outside
