"""A reasoning parser for the bundled pair: "def" starts reasoning, "return" ends it; each is one token."""

from __future__ import annotations

from vllm.reasoning import ReasoningParserManager
from vllm.reasoning.basic_parsers import BaseThinkingReasoningParser

REGISTERED = True
"""Named in an engine's `patches`, so that its process imports this module before vLLM looks for the parser."""


@ReasoningParserManager.register_module("pair")
class PairReasoningParser(BaseThinkingReasoningParser):
    """Reasoning between "def" and "return"."""

    @property
    def start_token(self) -> str:
        return "def"

    @property
    def end_token(self) -> str:
        return "return"
