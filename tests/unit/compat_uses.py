"""What `compat`, and what it hands on to `target`, uses of vLLM, read from the source without running it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from source_tree import DOTTED, SourceTree

CONFIG = "vllm.config.vllm:VllmConfig"
V1 = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
V2 = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"
V1_BATCH = "vllm.v1.worker.gpu_input_batch:InputBatch"
V2_BATCH = "vllm.v1.worker.gpu.input_batch:InputBatch"
V2_SAMPLER = "vllm.v1.worker.gpu.sample.sampler:Sampler"
SAMPLING_STATES = "vllm.v1.worker.gpu.sample.states:SamplingStates"
REQUESTS = "vllm.v1.worker.gpu.states:RequestState"
SCHEDULED = "vllm.v1.core.sched.output:SchedulerOutput"
GRAMMARS = "vllm.v1.core.sched.output:GrammarOutput"
NEW = "vllm.v1.core.sched.output:NewRequestData"
CACHED = "vllm.v1.worker.gpu_input_batch:CachedRequestState"
GROUP = "vllm.distributed.parallel_state:GroupCoordinator"
ARGUMENTS = "vllm.engine.arg_utils:EngineArgs"
PARALLEL = "vllm.config.parallel:ParallelConfig"
SAMPLING = "vllm.sampling_params:SamplingParams"
COMMON = "vllm.v1.attention.backend:CommonAttentionMetadata"

CORE = "vllm.v1.engine.core:EngineCore"

OBJECTS = {
    "compat.target.batches": {
        "config": CONFIG,
        "getattr(config, 'speculative_config', None)": "vllm.config.speculative:SpeculativeConfig",
    },
    "compat.target.cache_salt": {
        "engine": CORE,
        "request": "vllm.v1.engine:EngineCoreRequest",
        "params": SAMPLING,
    },
    "compat.target.configuration": {"engine_args": ARGUMENTS, "model_config": "vllm.config.model:ModelConfig"},
    "compat.target.gain": {
        "new": NEW,
        "runner": V1,
        "batch": V1_BATCH,
        "vllm_config": CONFIG,
        "params": SAMPLING,
        "structured": "vllm.sampling_params:StructuredOutputsParams",
    },
    "compat.target.lora": {"runner": V2, "scheduler_output": SCHEDULED},
    "compat.target.measure": {
        "engine": "vllm.v1.engine.llm_engine:LLMEngine",
        "cast('InprocClient', engine.engine_core)": "vllm.v1.engine.core_client:InprocClient",
        "_core(engine)": CORE,
        "worker": "vllm.v1.worker.worker_base:WorkerWrapperBase",
        "getattr(worker, 'worker', None)": "vllm.v1.worker.gpu_worker:Worker",
        "vllm_config": CONFIG,
    },
    "compat.target.noise": {"runner": V2, "states": SAMPLING_STATES},
    "compat.target.seeded_rounds": {"runner": V1, "batch": V1_BATCH, "params": SAMPLING},
    "compat.target.pipeline": {"runner": V1, "scheduler_output": SCHEDULED, "state": CACHED},
    "compat.target.runner": {"config": CONFIG, "engine_args": ARGUMENTS, "parallel_config": PARALLEL},
    "compat.target.runner_v1": {
        "runner": V1,
        "scheduler_output": SCHEDULED,
        "new": NEW,
        "spec_decode_metadata": "vllm.v1.spec_decode.metadata:SpecDecodeMetadata",
        "batch": V1_BATCH,
        "metadata": "vllm.v1.sample.metadata:SamplingMetadata",
        "group": GROUP,
    },
    "compat.target.runner_v2": {
        "runner": V2,
        "new": NEW,
        "batch": V2_BATCH,
        "input_batch": V2_BATCH,
        "req_states": REQUESTS,
        "scheduler_output": SCHEDULED,
        "grammar_output": GRAMMARS,
        "speculator": "vllm.v1.worker.gpu.spec_decode.ngram.speculator:NgramGPUSpeculator",
        "sampler.sampler": V2_SAMPLER,
        "sampler.sampler.sampling_states": SAMPLING_STATES,
        "manager": "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager",
        "graph": "vllm.v1.worker.gpu.cudagraph_utils:BatchExecutionDescriptor",
    },
    "compat.target.refused": {"model_config": "vllm.config.model:ModelConfig"},
    "compat.target.scheduler": {
        "vllm_config": CONFIG,
        "self": "vllm.v1.core.sched.scheduler:Scheduler",
        "scheduler_output": SCHEDULED,
        "model_runner_output": "vllm.v1.outputs:ModelRunnerOutput",
    },
    "compat.target.serve_flags": {
        "vllm_config": CONFIG,
        "model": "vllm.config.model:ModelConfig",
        "platform": "vllm.platforms.cuda:CudaPlatformBase",
    },
    "compat.target.truncation": {"params": "vllm.sampling_params:SamplingParams"},
    "compat.vocabulary": {
        "model_config": "vllm.config.model:ModelConfig",
        "tokenizer": "vllm.tokenizers.protocol:TokenizerLike",
    },
    "compat.target.thinking_budget": {
        "self": "vllm.v1.sample.thinking_budget_state:ThinkingBudgetStateHolder",
        "batch_update": "vllm.v1.sample.logits_processor.interface:BatchUpdate",
    },
    "compat.target.unsupported": {"model_config": "vllm.config.model:ModelConfig"},
    "compat.target.weights": {"worker": "vllm.v1.worker.gpu_worker:Worker"},
    "compat.target.worker": {
        "worker": "vllm.v1.worker.gpu_worker:Worker",
        "snapshot": "vllm.utils.mem_utils:MemorySnapshot",
    },
    "compat.drafter.cpu_norms": {"self": "vllm.model_executor.layers.layernorm:RMSNorm"},
    "compat.drafter.decode_graphs": {
        "vllm_config": CONFIG,
        "compilation": "vllm.config.compilation:CompilationConfig",
        "scheduler": "vllm.config.scheduler:SchedulerConfig",
        "builder": "vllm.v1.attention.backend:AttentionMetadataBuilder",
        "self._builder": "vllm.v1.attention.backend:AttentionMetadataBuilder",
        "kind": "vllm.v1.attention.backend:AttentionMetadataBuilder",
    },
    "compat.drafter.draft_model": {
        "args": ARGUMENTS,
        "self.vllm_config": CONFIG,
        "core": CORE,
        "cast(UniProcExecutor, core.model_executor)": "vllm.v1.executor.uniproc_executor:UniProcExecutor",
        "runner": V1,
        "groups": "vllm.v1.kv_cache_interface:KVCacheGroupSpec",
        "group": "vllm.v1.worker.utils:AttentionGroup",
        "builder": "vllm.v1.attention.backend:AttentionMetadataBuilder",
        "model_config": "vllm.config.model:ModelConfig",
        "config": "vllm.config.model:ModelConfig",
    },
    "compat.drafter.memory": {
        "vllm_config": CONFIG,
        "model": "vllm.config.model:ModelConfig",
        "parallel": PARALLEL,
    },
    "compat.drafter.tree_backend": {
        "batch": COMMON,
        "common_attn_metadata": COMMON,
        "layer": "vllm.v1.attention.backend:AttentionLayer",
        "vllm_config": CONFIG,
        "model": "vllm.config.model:ModelConfig",
    },
    "target.start": {
        "vllm_config": CONFIG,
        "model": "vllm.config.model:ModelConfig",
        "cache": "vllm.config.cache:CacheConfig",
    },
    "target.v1.proposer": {"get_tp_group()": GROUP},
    "target.v2.speculator": {
        "vllm_config": CONFIG,
        "batch": V2_BATCH,
        "req_states": REQUESTS,
        "self._req_states": REQUESTS,
        "self._group": GROUP,
    },
}
"""vLLM's classes behind the names that a module has for objects of theirs."""

NOT_VLLM = {("compat.drafter.tree_backend", "TreeAttentionMetadata.from_batch"): {"batch"}}
"""Functions in which such a name is another object's."""

TYPES = {
    f"{CONFIG}.speculative_config": "vllm.config.speculative:SpeculativeConfig",
    f"{CONFIG}.scheduler_config": "vllm.config.scheduler:SchedulerConfig",
    f"{CONFIG}.parallel_config": PARALLEL,
    f"{CONFIG}.device_config": "vllm.config.device:DeviceConfig",
    f"{CONFIG}.model_config": "vllm.config.model:ModelConfig",
    f"{CONFIG}.cache_config": "vllm.config.cache:CacheConfig",
    f"{V1}.sampler": "vllm.v1.sample.sampler:Sampler",
    f"{V1}.input_batch": V1_BATCH,
    f"{V1_BATCH}.sampling_metadata": "vllm.v1.sample.metadata:SamplingMetadata",
    f"{V1}.requests": CACHED,
    f"{V1}.kv_cache_config": "vllm.v1.kv_cache_interface:KVCacheConfig",
    f"{V1}.attn_groups": "vllm.v1.worker.utils:AttentionGroup",
    f"{V2}.req_states": REQUESTS,
    f"{V2}.sampler": V2_SAMPLER,
    f"{V2_SAMPLER}.sampling_states": SAMPLING_STATES,
    f"{SAMPLING_STATES}.seeds": "vllm.v1.worker.gpu.buffer_utils:UvaBackedTensor",
    f"{SAMPLING_STATES}.temperature": "vllm.v1.worker.gpu.buffer_utils:UvaBackedTensor",
    f"{SCHEDULED}.scheduled_cached_reqs": "vllm.v1.core.sched.output:CachedRequestData",
    f"{CONFIG}.structured_outputs_config": "vllm.config.structured_outputs:StructuredOutputsConfig",
    f"{NEW}.sampling_params": SAMPLING,
    "vllm.v1.core.sched.scheduler:Scheduler.parallel_config": PARALLEL,
    f"{CORE}.model_executor": "vllm.v1.executor.uniproc_executor:UniProcExecutor",
    "vllm.v1.executor.uniproc_executor:UniProcExecutor.driver_worker": "vllm.v1.worker.worker_base:WorkerWrapperBase",
    "vllm.v1.worker.worker_base:WorkerWrapperBase.worker": "vllm.v1.worker.gpu_worker:Worker",
    "vllm.v1.kv_cache_interface:KVCacheGroupSpec.kv_cache_spec": "vllm.v1.kv_cache_interface:KVCacheSpec",
    f"{REQUESTS}.total_len": "vllm.v1.worker.gpu.buffer_utils:StagedWriteTensor",
    "vllm.config:SpeculativeConfig": "vllm.config.speculative:SpeculativeConfig",
    "vllm.platforms:current_platform": "vllm.platforms.interface:Platform",
}
"""Classes of their attributes; of a list or dict, of what is in it."""


def uses(tree: SourceTree) -> dict[str, set[str]]:
    """Symbols `module:path`, and plain modules, that the source reaches; for each, the keywords it is called with."""
    found: dict[str, set[str]] = {}
    for module, syntax in tree.modules.items():
        room = module.removeprefix("vllm_ssd.")
        if (room.startswith("compat.") and room != "compat.symbols") or room in OBJECTS:
            for name, keywords in _Module(room, syntax).uses():
                found.setdefault(name, set()).update(keywords)
    return found


class _Module:
    def __init__(self, room: str, syntax: ast.Module) -> None:
        self._room = room
        self._syntax = syntax
        self._objects = OBJECTS.get(room, {})
        self._own: set[str] = set()  # attributes of our own classes, whose `self` is vLLM's object too
        self._imports: dict[str, str] = {}
        self._strings: dict[str, str] = {}
        in_compat = room.startswith("compat.")
        for node in ast.walk(syntax):
            if isinstance(node, (ast.Import, ast.ImportFrom)) and not in_compat:
                continue  # public names: see test_layers
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                for alias in node.names:
                    self._imports[alias.asname or alias.name] = _name(node.module, alias.name)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.split(".")[0] == "vllm":
                        self._imports[alias.asname or "vllm"] = alias.name if alias.asname else "vllm"
            elif isinstance(node, ast.ClassDef):
                self._own |= {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
                self._own |= {t.id for item in node.body if isinstance(item, ast.Assign) for t in item.targets}
                self._own |= {a.attr for a in ast.walk(node) if isinstance(a, ast.Attribute) and _is_our_store(a)}
            elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                for target in node.targets:
                    if isinstance(target, ast.Name) and isinstance(node.value.value, str):
                        self._strings[target.id] = node.value.value

    def uses(self) -> Iterator[tuple[str, set[str]]]:
        for name in self._imports.values():
            if name != "vllm":
                yield name, set()
        yield from self._below(self._syntax, "", set(self._objects))

    def _below(self, node: ast.AST, where: str, objects: set[str]) -> Iterator[tuple[str, set[str]]]:
        for child in ast.iter_child_nodes(node):
            inner, known = where, objects
            if isinstance(child, (ast.ClassDef, ast.FunctionDef)):
                inner = f"{where}.{child.name}".strip(".")
                known = objects - NOT_VLLM.get((self._room, inner), set())
            yield from self._at(child, known)
            yield from self._below(child, inner, known)

    def _at(self, node: ast.AST, objects: set[str]) -> Iterator[tuple[str, set[str]]]:
        if isinstance(node, ast.Attribute):
            name = self._symbol(node, objects)
            if name is not None:
                yield name, set()
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr") and len(node.args) > 1:
                owner, attribute = self._type(node.args[0], objects), node.args[1]
                if isinstance(node.args[0], ast.Name) and owner is None:
                    owner = TYPES.get(self._imports.get(node.args[0].id, ""))
                if owner is not None and isinstance(attribute, ast.Constant):
                    yield f"{owner}.{attribute.value}", set()
            called = self._symbol(node.func, objects)
            keywords = {keyword.arg for keyword in node.keywords if keyword.arg}
            if called in TYPES:
                yield f"{TYPES[called]}.forward", keywords  # a module of torch
            elif called is not None:
                yield called, keywords
            elif ast.unparse(node.func) == "dataclasses.replace":
                replaced = self._type(node.args[0], objects)
                for keyword in keywords if replaced else ():
                    yield f"{replaced}.{keyword}", set()
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if DOTTED.fullmatch(node.value) and node.value.startswith("vllm.") and node.value != LOGGER:
                yield node.value.rstrip("."), set()
        elif isinstance(node, ast.JoinedStr) and len(node.values) == 2:
            first, second = node.values
            if isinstance(first, ast.FormattedValue) and isinstance(first.value, ast.Name):
                prefix = self._strings.get(first.value.id, "")
                if prefix.startswith("vllm.") and isinstance(second, ast.Constant):  # `f"{CLASS}.method"`
                    yield f"{prefix}{second.value}", set()

    def _symbol(self, node: ast.AST, objects: set[str]) -> str | None:
        """The symbol that an expression names: something imported, or an attribute of an object."""
        if isinstance(node, ast.Name):
            name = self._imports.get(node.id)
            return name if name != "vllm" else None
        if not isinstance(node, ast.Attribute):
            return None
        if node.attr == "__name__":
            return None
        if isinstance(node.value, ast.Name) and self._imports.get(node.value.id, "") in TYPES:
            return f"{TYPES[self._imports[node.value.id]]}.{node.attr}"
        if isinstance(node.value, ast.Name) and node.value.id in self._imports:
            return _name(self._imports[node.value.id], node.attr)
        owner = self._type(node.value, objects)
        if owner is None or (owner == self._objects.get("self") and node.attr in self._own):
            return None
        return f"{owner}.{node.attr}"

    def _type(self, node: ast.AST, objects: set[str]) -> str | None:
        """The class of the object that an expression gives, or of what is in it."""
        text = ast.unparse(node)
        if text in objects:
            return self._objects[text]
        if isinstance(node, ast.Subscript):
            return self._type(node.value, objects)
        if isinstance(node, ast.Name):
            return TYPES.get(self._imports.get(node.id, ""))
        symbol = self._symbol(node, objects)
        return TYPES.get(symbol or "")


def _is_our_store(node: ast.Attribute) -> bool:
    """Whether it sets a private attribute of `self`, which is then ours."""
    return isinstance(node.ctx, ast.Store) and node.attr.startswith("_") and ast.unparse(node.value) == "self"


def _name(owner: str | None, attribute: str) -> str:
    """`owner.attribute`, with a colon where `owner` is a module."""
    assert owner
    if ":" in owner:
        return f"{owner}.{attribute}"
    return f"{owner}.{attribute}" if _is_module(f"{owner}.{attribute}") else f"{owner}:{attribute}"


LOGGER = "vllm.vllm_ssd"

MODULES = {"vllm.envs", "vllm.utils.cpu_triton_utils", "vllm.v1.sample.rejection_sampler"}
"""Modules that are imported from their package as a name."""


def _is_module(name: str) -> bool:
    return name in MODULES


def product(folder: Path) -> SourceTree:
    """The product's modules below a checkout's folder."""
    return SourceTree({"vllm_ssd": folder / "vllm_ssd"})
