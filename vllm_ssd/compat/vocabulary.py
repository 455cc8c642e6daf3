"""Read the vocabulary of a model's tokenizer through vLLM."""

from __future__ import annotations

from typing import Any

from vllm.config import ModelConfig
from vllm.tokenizers import cached_tokenizer_from_config


def read_vocabulary(model_config: ModelConfig) -> tuple[list[str], int]:
    """The string of each token id, "" for ids without one, and the id of a stand-in for unknown tokens.

    The strings are [] for a model without a tokenizer. The stand-in is the unknown token or, without one, the
    end-of-text token. Raises whatever the tokenizer raises if its files are missing.
    """
    tokenizer = cached_tokenizer_from_config(model_config)
    end = getattr(model_config.hf_text_config, "eos_token_id", None)
    candidates = [getattr(tokenizer, name, None) for name in ("unk_token_id", "eos_token_id")]
    candidates.append(end[0] if isinstance(end, list) and end else end)
    stand_in = next((i for i in candidates if isinstance(i, int) and 0 <= i < model_config.get_vocab_size()), 0)
    if tokenizer is None:
        return [], stand_in
    names = tokenizer.get_vocab()
    token_ids = sorted(set(names.values()))
    strings: list[Any] = list(tokenizer.convert_ids_to_tokens(token_ids))
    if len(strings) != len(token_ids):  # this tokenizer omits some ids
        by_id = {token_id: name for name, token_id in names.items()}
        strings = [by_id[token_id] for token_id in token_ids]
    tokens = [""] * (token_ids[-1] + 1 if token_ids else 0)
    for token_id, string in zip(token_ids, strings):
        tokens[token_id] = _as_text(string)
    return tokens, stand_in


def _as_text(token: str | bytes | None) -> str:
    """A token's string, restricted to valid UTF-8."""
    text = token.decode("latin-1") if isinstance(token, bytes) else token or ""
    return text.encode("utf-8", "replace").decode()
