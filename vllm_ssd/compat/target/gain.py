"""Find requests that cannot gain from drafts, which are never opened on the drafter."""

from __future__ import annotations

import logging
import re
from typing import Any

logger = logging.getLogger("vllm.vllm_ssd")

SHORT_CHOICE_CHARS = 12
"""If the answer is one of several texts up to this long, it takes a token or two, and the drafter's prefill costs more
than a round saves."""
LITERAL = r'"((?:[^"\\]|\\.)*)"'
CHOICES = re.compile(rf"root ::= {LITERAL}(?: \| {LITERAL})*")
"""The grammar that vLLM generates from `choice` for xgrammar."""

_told = False


def can_gain(new: Any, vllm_config: Any) -> bool:
    """Whether drafts can help a request; new: vLLM's `NewRequestData`.

    The drafter must be able to read the whole prompt, and some round must begin with at least two tokens left to emit.
    """
    params = new.sampling_params
    if params is None:
        return False
    if new.mm_features or new.prompt_embeds is not None or not new.prompt_token_ids:
        _tell_once(new.req_id)
        return False
    num_emitted = max(len(new.prefill_token_ids or ()) - len(new.prompt_token_ids), 0)  # before it was preempted
    if params.max_tokens is not None and params.max_tokens - num_emitted < 3:  # the first round only emits
        return False
    if params.structured_outputs is None or vllm_config.structured_outputs_config.reasoning_parser:
        return True
    choices = _choices(params.structured_outputs)
    return not choices or max(map(len, choices)) > SHORT_CHOICE_CHARS


def last_length(new: Any) -> int | None:
    """Most committed tokens that the request can have, by its max_tokens; None without a limit."""
    max_tokens = new.sampling_params.max_tokens
    return None if max_tokens is None else len(new.prompt_token_ids) + max_tokens


def ending_requests(runner: Any, request_ids: list[str]) -> list[str]:
    """The requests in the V1 runner's rows whose next round emits their last token."""
    batch = runner.input_batch
    num_emitted = batch.num_tokens_no_spec[: len(request_ids)] - batch.num_prompt_tokens[: len(request_ids)]
    ending = []
    for request_id, emitted in zip(request_ids, num_emitted.tolist()):
        params = runner.requests[request_id].sampling_params
        if params is not None and params.max_tokens == emitted + 1:
            ending.append(request_id)
    return ending


def _choices(structured: Any) -> list[str]:
    """The texts that a structured output chooses from; empty for other kinds of structured output."""
    if structured.choice:
        return list(structured.choice)
    grammar = structured.grammar
    return re.findall(LITERAL, grammar) if isinstance(grammar, str) and CHOICES.fullmatch(grammar) else []


def _tell_once(request_id: str) -> None:
    global _told
    if not _told:
        _told = True
        logger.warning(
            "SSD: request %s runs without drafts: the drafter reads token ids, not images, sounds or prompt "
            "embeddings; more such requests are not reported",
            request_id,
        )
