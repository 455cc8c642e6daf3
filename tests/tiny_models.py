"""Random Llamas over a vocabulary of two dozen tokens, and their exact next-token probabilities; one that sees."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCAB_SIZE = 24
WORDS = [f"t{i}" for i in range(VOCAB_SIZE)]
SEEING_WORDS = [*WORDS[:-1], "<image>"]
"""Of a model that sees: the last stands in prompts where an image is."""
LOGIT_SCALE = 0.2
"""Spread of the output weights: the likeliest token of a context then has a probability of about 0.4."""


def write_pair(folder: Path, noise: float) -> tuple[Path, Path]:
    """A target and a drafter whose weights are the target's plus `noise` times as much of others; their folders."""
    target, other = random_llama(seed=1), random_llama(seed=2)
    save(target, folder / "target")
    with torch.no_grad():
        for weight, stranger in zip(target.parameters(), other.parameters()):
            if weight.dim() > 1:
                weight += noise * stranger
    save(target, folder / "drafter")
    return folder / "target", folder / "drafter"


def random_llama(seed: int, rows: int = VOCAB_SIZE) -> LlamaForCausalLM:
    """A float32 Llama whose attention and MLP weigh as much as its embedding, so that context matters."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=rows,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "embed" in name:
                weight.normal_()
            elif "lm_head" in name:
                weight.normal_(std=LOGIT_SCALE)
            elif weight.dim() > 1:
                weight.normal_(std=weight.shape[1] ** -0.5)
    return model


def save(model: PreTrainedModel, folder: Path, words: Sequence[str] = WORDS) -> None:
    """Write `model` with a tokenizer of one of `words` a token."""
    model.save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0", eos_token="t0").save_pretrained(folder)


def write_with_words(model: Path, folder: Path, words: Sequence[str], num_rows: int) -> Path:
    """A copy in `folder` whose ids are those of `words`, padded to `num_rows`; what the original lacks is random."""
    original, copy = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32), random_llama(seed=3, rows=num_rows)
    with torch.no_grad():
        for weight, known in zip(copy.parameters(), original.parameters(), strict=True):
            if weight.shape == known.shape:
                weight.copy_(known)
                continue
            for i, word in enumerate(words):
                if word in WORDS:
                    weight[i] = known[WORDS.index(word)]
    save(copy, folder, words)
    return folder


def write_seeing(model: Path, folder: Path) -> Path:
    """A BLIP-2 in `folder` whose language model is the Llama of `model`, over `SEEING_WORDS`; the rest is random."""
    from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    language = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    torch.manual_seed(4)
    seeing = Blip2ForConditionalGeneration(
        Blip2Config(
            vision_config={**small, "image_size": 32, "patch_size": 16},
            qformer_config={**small, "cross_attention_frequency": 1},
            text_config=language.config.to_dict(),
            num_query_tokens=4,
            image_token_index=VOCAB_SIZE - 1,
        )
    )
    with torch.no_grad():
        for name, weight in seeing.named_parameters():
            if weight.dim() > 1 and not name.startswith("language_model"):
                weight.normal_(std=weight[0].numel() ** -0.5)
        seeing.query_tokens.normal_()
    seeing.language_model.load_state_dict(language.state_dict())
    save(seeing, folder, SEEING_WORDS)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    images = BlipImageProcessorPil(size={"height": 32, "width": 32})
    Blip2Processor(images, tokenizer, num_query_tokens=4).save_pretrained(folder)
    return folder


@torch.inference_mode()
def next_token_logits(folder: Path, prompt_len: int, sequences: torch.Tensor) -> torch.Tensor:
    """Logits `[B, T, VOCAB_SIZE]` float64 of each token of `sequences` [B, prompt_len + T]."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model(sequences[:, :-1]).logits[:, prompt_len - 1 :].double()
