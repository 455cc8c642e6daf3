"""Tiny random models of the decoders that vLLM knows, written from transformers' configurations.

Hidden size 128, few layers, float32, a vocabulary of words "t0", "t1" and so on. Attention and MLP weigh as much as
the embedding, so that the next token depends on all of the context, and windows are shorter than the prompts.
"""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tiny_models import save

VOCAB_SIZE = 96
MAX_MODEL_LEN = 256
WINDOW = 16
MIN_VARIETY = 8
"""Different tokens in a text of 24: one that repeats itself would not show a wrong context."""
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "hidden_size": 128,
    "n_embd": 128,
    "d_model": 128,
    "word_embed_proj_dim": 128,
    "intermediate_size": 128,
    "ffn_dim": 128,
    "n_inner": 128,
    "ffn_hidden_size": 128,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "shared_intermediate_size": 64,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "global_head_dim": 32,
    "rotary_dim": 32,
    "kv_channels": 32,
    "n_positions": MAX_MODEL_LEN,
    "n_ctx": MAX_MODEL_LEN,
    "max_seq_len": MAX_MODEL_LEN,
    "max_position_embeddings": MAX_MODEL_LEN,
    "sliding_window": WINDOW,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 16,
    "laurel_rank": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "mamba_num_heads": 8,
    "mamba_n_heads": 8,
    "mamba_head_dim": 32,
    "mamba_d_head": 32,
    "mamba_d_state": 16,
    "mamba_d_ssm": 256,
    "mamba_n_groups": 1,
    "n_groups": 1,
    "n_mamba_heads": 8,
    "state_size": 16,
    "ssm_state_size": 16,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}
"""Values of the settings that a configuration has; others stay as transformers has them."""

TIED = {"tie_word_embeddings": True}
LATENT = {
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "head_dim": 64,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": MAX_MODEL_LEN // 4,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    },
}
"""As DeepSeek has it, with the one size of latent keys that the CPU build has; it rotates them wrongly without YaRN
(`docs/limits.md`)."""
MIXED = ["sliding_attention", "full_attention"] * 2


@dataclass(frozen=True)
class Entry:
    """A model type of transformers, what its layers attend to, settings unlike `SMALL`, the dtype to run in, and the
    architecture where vLLM has another name for it."""

    model_type: str
    attention: str = "full"
    settings: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    architecture: str = ""

    @property
    def is_recurrent(self) -> bool:
        """Whether a layer carries a state from token to token, so that it cannot draft."""
        return "recurrent" in self.attention


def _mixed(model_type: str, attention: str = "sliding and full", **settings: Any) -> Entry:
    return Entry(model_type, attention, {"num_hidden_layers": 4, "layer_types": MIXED, **settings})


def _gated_delta(model_type: str, attention: str, **settings: Any) -> Entry:
    """With gated delta networks in every other layer, of which vLLM's CPU build has bfloat16 alone."""
    layers = {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2}
    return Entry(model_type, f"recurrent (gated delta) and {attention}", layers | settings, "bfloat16")


ZOO: dict[str, Entry] = {
    # full attention
    "llama": Entry("llama"),
    "llama_yarn": Entry(
        "llama",
        "full, YaRN",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": MAX_MODEL_LEN // 4,
            }
        },
    ),
    "mistral": Entry("mistral", "sliding"),
    "ministral3": Entry("ministral3"),
    "qwen2": Entry("qwen2"),
    "qwen3": Entry("qwen3"),
    "gemma": Entry("gemma", settings=TIED),
    "phi": Entry("phi"),
    "phi3": Entry("phi3", settings={"sliding_window": None}),
    "olmo": Entry("olmo"),
    "olmo2": Entry("olmo2"),
    "granite": Entry("granite"),
    "starcoder2": Entry("starcoder2", settings={"sliding_window": None}),
    "stablelm": Entry("stablelm"),
    "cohere": Entry("cohere", settings=TIED),
    "glm": Entry("glm"),
    "glm4": Entry("glm4"),
    "nemotron": Entry("nemotron"),
    "smollm3": Entry("smollm3"),
    "seed_oss": Entry("seed_oss"),
    "apertus": Entry("apertus"),
    "arcee": Entry("arcee"),
    "ernie4_5": Entry("ernie4_5"),
    "hunyuan_v1_dense": Entry("hunyuan_v1_dense"),
    "hyperclovax": Entry("hyperclovax"),
    "hrm_text": Entry(
        "hrm_text",
        "full, prefix LM",
        {"num_hidden_layers": 1, "prefix_lm": False, "embedding_scale": 1.0},
    ),
    "mimo": Entry("qwen2", architecture="MiMoForCausalLM"),
    "persimmon": Entry("persimmon"),
    "gpt2": Entry("gpt2", "full, learned positions", TIED),
    "gpt_bigcode": Entry("gpt_bigcode", "full, multi-query", TIED),
    "gptj": Entry("gptj"),
    "gpt_neox": Entry("gpt_neox"),
    "opt": Entry("opt", "full, learned positions", TIED),
    "falcon": Entry(
        "falcon",
        settings={"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 512, **TIED},
    ),
    "falcon_alibi": Entry(
        "falcon", "full, ALiBi", {"alibi": True, "ffn_hidden_size": 512, "parallel_attn": False, **TIED}
    ),
    "bloom": Entry("bloom", "full, ALiBi", TIED),
    # mixtures of experts
    "mixtral": Entry("mixtral", "full, experts", {"sliding_window": None}),
    "qwen2_moe": Entry("qwen2_moe", "full, experts"),
    "qwen3_moe": Entry("qwen3_moe", "full, experts"),
    "granitemoe": Entry("granitemoe", "full, experts"),
    "granitemoeshared": Entry("granitemoeshared", "full, experts"),
    "olmoe": Entry("olmoe", "full, experts"),
    "phimoe": Entry(
        "phimoe",
        "full, experts",
        {"sliding_window": None, "lm_head_bias": True, "attention_bias": True},  # vLLM's class always has both
        architecture="PhiMoEForCausalLM",
    ),
    "glm4_moe": Entry("glm4_moe", "full, experts", {"first_k_dense_replace": 1, "head_dim": 32}),
    "ernie4_5_moe": Entry("ernie4_5_moe", "full, experts"),
    "hunyuan_v1_moe": Entry("hunyuan_v1_moe", "full, experts"),
    "dots1": Entry("dots1", "full, experts", {"first_k_dense_replace": 1, "n_shared_experts": 1}),
    "hy_v3": Entry(
        "hy_v3",
        "full, experts",
        {"first_k_dense_replace": 1, "qk_norm": True, "route_norm": True, "expert_hidden_dim": 64},
    ),
    "dbrx": Entry(
        "dbrx",
        "full, experts",
        {
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    "minimax_m2": Entry(
        "minimax_m2", "full, experts", {"rotary_dim": 32, "scoring_func": "sigmoid", "use_routing_bias": True}
    ),
    "deepseek_v2": Entry("deepseek_v2", "latent, experts", LATENT),
    "deepseek_v3": Entry("deepseek_v3", "latent, experts", {"topk_method": "noaux_tc", **LATENT}),
    "glm4_moe_lite": Entry("glm4_moe_lite", "latent, experts", LATENT),
    "axk1": Entry("axk1", "latent, experts", LATENT | {"first_k_dense_replace": 0}),
    "longcat_flash": Entry(
        "longcat_flash",
        "latent, experts",
        {
            **LATENT,
            "num_layers": 2,
            "zero_expert_num": 0,
            "zero_expert_type": "identity",
            "mla_scale_q_lora": True,
            "mla_scale_kv_lora": True,
        },
    ),
    "deepseek_v32": Entry("deepseek_v32", "latent and sparse, experts", {"index_topk": 64, **LATENT}),
    "glm_moe_dsa": Entry("glm_moe_dsa", "latent and sparse, experts", {"index_topk": 64, **LATENT}),
    "hy_v4": Entry("hy_v4", "latent and sparse, experts", {"index_topk": 64, **LATENT}),
    "minicpm3": Entry("minicpm3", "latent"),
    # sliding and full layers mixed
    "gemma2": _mixed("gemma2", "sliding and full, soft caps", **TIED),
    "gemma3": _mixed("gemma3_text"),
    "gemma3n": _mixed("gemma3n_text", **TIED, activation_sparsity_pattern=[0.0] * 4, intermediate_size=[128] * 4),
    "gemma4": _mixed("gemma4_text", **TIED, num_experts=None),
    "cohere2": _mixed("cohere2", **TIED),
    "gpt_oss": _mixed("gpt_oss", "sliding and full, sinks, experts"),
    "llama4": Entry(
        "llama4_text",
        "chunked and full, experts",
        {
            "num_hidden_layers": 4,
            "attention_chunk_size": 2 * WINDOW,  # a multiple of the page
            "no_rope_layers": [1, 1, 1, 0],
            "num_experts_per_tok": 1,
            "layer_types": ["chunked_attention"] * 3 + ["full_attention"],
            "intermediate_size_mlp": 128,
        },
    ),
    "cohere2_moe": _mixed("cohere2_moe", "sliding and full, experts", first_k_dense_replace=1, **TIED),
    "exaone_moe": _mixed("exaone_moe", "sliding and full, experts", first_k_dense_replace=1),
    "laguna": _mixed("laguna", "sliding and full, experts"),
    "mimo_v2_flash": _mixed(
        "mimo_v2_flash",
        "sliding and full, sinks, experts",
        layernorm_epsilon=1e-5,
        hybrid_layer_pattern=[1, 0, 1, 0],
        moe_layer_freq=[0, 1, 1, 1],
        sliding_window_size=WINDOW,
        swa_head_dim=32,
        swa_v_head_dim=32,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=2,
        add_swa_attention_sink_bias=True,
    ),
    "rnj1": Entry(
        "gemma3_text",
        "sliding and full",
        {"num_hidden_layers": 4, "layer_types": MIXED},
        architecture="Rnj1ForCausalLM",
    ),
    "olmo3": _mixed("olmo3"),
    "exaone4": _mixed("exaone4"),
    "granite_swa": _mixed("granite_swa"),
    "granitemoe_swa": _mixed("granitemoe_swa", "sliding and full, experts"),
    "afmoe": _mixed(
        "afmoe",
        "sliding and full, experts",
        num_dense_layers=1,
        score_func="sigmoid",
        route_norm=True,
        route_scale=1.0,
        n_group=1,
        topk_group=1,
    ),
    # recurrent or linear-attention layers
    "mamba": Entry("mamba", "recurrent"),
    "mamba2": Entry("mamba2", "recurrent", {"num_heads": 8, "head_dim": 32, "expand": 2}),
    "falcon_mamba": Entry("falcon_mamba", "recurrent"),
    "jamba": Entry(
        "jamba", "recurrent and full, experts", {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1}
    ),
    "bamba": Entry("bamba", "recurrent and full", {"num_hidden_layers": 4, "attn_layer_indices": [1, 3]}),
    "falcon_h1": Entry("falcon_h1", "recurrent and full"),
    "zamba2": Entry(
        "zamba2",
        "recurrent and full",
        {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "num_key_value_heads": 4, **TIED},
    ),
    "granitemoehybrid": Entry(
        "granitemoehybrid", "recurrent and full", {"num_hidden_layers": 4, "layer_types": ["mamba", "attention"] * 2}
    ),
    "granite4_attention": Entry(
        "granitemoehybrid", "full", {"num_hidden_layers": 2, "layer_types": ["attention", "attention"]}
    ),
    "lfm2": Entry(
        "lfm2",
        "recurrent (short convolutions) and full",
        {
            "num_hidden_layers": 4,
            "layer_types": ["conv", "full_attention"] * 2,
            "conv_dim": 128,
            "conv_dim_out": 128,
            "block_dim": 128,
        },
    ),
    "lfm2_moe": Entry(
        "lfm2_moe",
        "recurrent (short convolutions) and full, experts",
        {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    ),
    "qwen3_next": _gated_delta("qwen3_next", "full, experts"),
    "qwen3_5": _gated_delta("qwen3_5_text", "full"),
    "qwen3_5_moe": _gated_delta("qwen3_5_moe_text", "full, experts"),
    "olmo_hybrid": _gated_delta("olmo_hybrid", "full"),
    "kimi_linear": _gated_delta("kimi_linear", "latent, experts", linear_num_heads=2, **LATENT),
    "qwen4_exp": _gated_delta(
        "qwen4_exp_text",
        "sparse, experts",
        layer_types=["linear_attention", "indexed_attention"] * 2,
        indexer_n_heads=4,
        indexer_kv_heads=1,
        indexer_head_dim=32,
        indexer_budget=64,
        indexer_compress_ratio=4,
    ),
    "nemotron_h": Entry("nemotron_h", "recurrent and full", {"layers_block_type": ["mamba", "attention", "mlp"] * 2}),
}
"""Names on the command line of `scripts/check_models.py`."""

LEFT_OUT: dict[str, tuple[str, ...]] = {
    "another name of a class that is in the table": (
        "ExaoneMoEForCausalLM",
        "InternLM3ForCausalLM",
        "IQuestCoderForCausalLM",
        "LLaMAForCausalLM",
        "NemotronHPuzzleForCausalLM",
        "TeleChat3ForCausalLM",
    ),
    "vLLM asks for special tokens that a small model's tokenizer lacks": (
        "InklingForCausalLM",
        "InklingForConditionalGeneration",
    ),
    "vLLM reads another configuration than transformers writes": ("DeepseekV4ForCausalLM",),
    "no model of transformers to make a small one from": (
        "BailingMoeForCausalLM",
        "BailingMoeV2ForCausalLM",
        "BailingMoeV2_5ForCausalLM",
        "BailingMoeV3ForCausalLM",
        "ChatGLMForConditionalGeneration",
        "ChatGLMModel",
        "DeciLMForCausalLM",
        "DeepseekForCausalLM",
        "ExaoneForCausalLM",
        "Glm5NextForCausalLM",
        "HCXVisionV2ForCausalLM",
        "InternLM2ForCausalLM",
        "IQuestLoopCoderForCausalLM",
        "K2HorizonForCausalLM",
        "LongcatFlashNgramForCausalLM",
        "MiMoV2ForCausalLM",
        "MiniCPMForCausalLM",
        "MiniMaxM3SparseForCausalLM",
        "MistralLarge3ForCausalLM",
        "MuseGlimmerForCausalLM",
        "OrionForCausalLM",
        "PanguEmbeddedForCausalLM",
        "PanguProMoEV2ForCausalLM",
        "PanguUltraMoEForCausalLM",
        "Param2MoEForCausalLM",
        "Plamo3ForCausalLM",
        "SarvamMLAForCausalLM",
        "SarvamMoEForCausalLM",
        "SolarForCausalLM",
        "Step1ForCausalLM",
        "Step3TextForCausalLM",
        "Step3p5ForCausalLM",
        "TeleChat2ForCausalLM",
        "TeleFLMForCausalLM",
    ),
}
"""Text decoders of vLLM's registry that have no model here, by the reason."""


def write(name: str, folder: Path, *, vocab_size: int = VOCAB_SIZE, seed: int = 1) -> None:
    """Write the model `name` of `ZOO` into `folder`; equal seeds give equal weights."""
    from transformers import AutoModelForCausalLM

    config = configuration(ZOO[name], vocab_size)
    model = None
    for attempt in range(8):
        torch.manual_seed(100 * seed + attempt)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        randomise(model, tied_std=0.1 if attempt < 2 else 0.03)
        if variety(model, vocab_size) >= MIN_VARIETY:
            break
    save(model, folder, [f"t{i}" for i in range(vocab_size)])
    if ZOO[name].architecture:
        written = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(written | {"architectures": [ZOO[name].architecture]}))


@torch.inference_mode()
def variety(model: Any, vocab_size: int) -> int:
    """How many different tokens follow the first few; as if many where transformers cannot say."""
    token_ids = torch.randint(4, vocab_size, (1, 8))
    try:
        for _ in range(24):
            token_ids = torch.cat([token_ids, model(token_ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    except Exception:  # an implementation of transformers' that this machine cannot run; vLLM's is under test
        return vocab_size
    return len(set(token_ids[0, 8:].tolist()))


def architecture(entry: Entry) -> str:
    """What the model's config.json names; vLLM may run it as another."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return entry.architecture or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[entry.model_type]


def configuration(entry: Entry, vocab_size: int = VOCAB_SIZE) -> Any:
    """Transformers' configuration of a small model of the kind."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[entry.model_type]
    known = {*inspect.signature(kind.__init__).parameters, *getattr(kind, "__annotations__", {})}
    sizes = {key: vocab_size for key in SMALL if key.startswith("vocab_size")}
    return kind(**({key: value for key, value in {**SMALL, **sizes}.items() if key in known} | entry.settings))


@torch.no_grad()
def randomise(model: Any, tied_std: float) -> None:
    """Draw the matrices so that every layer matters; an embedding that is also the output weighs less than the layers,
    or each token would be followed by itself."""
    output = model.get_output_embeddings()
    tied = output is not None and output.weight is model.get_input_embeddings().weight
    for name, weight in model.named_parameters():
        if "embed" in name or ".wte" in name or ".wpe" in name:
            weight.normal_(std=tied_std if tied else 1.0)
        elif output is not None and weight is output.weight:
            weight.normal_(std=0.5)
        elif weight.dim() > 1 and "conv1d" not in name:
            weight.normal_(std=1.5 * weight.shape[-1] ** -0.5)
        elif name.endswith("bias"):
            weight.normal_(std=0.1)
