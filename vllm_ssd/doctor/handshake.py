"""Simulate the handshake of a target and its drafter from their configurations."""

from __future__ import annotations

from vllm.config import VllmConfig

from vllm_ssd.compat.vocabulary import read_vocabulary
from vllm_ssd.config import SSDConfig
from vllm_ssd.drafter.server import greet
from vllm_ssd.link.protocol import PROTOCOL_VERSION, Refused, Welcome, fingerprint
from vllm_ssd.target.start import _hello


def shake_hands(config: SSDConfig, target: VllmConfig, drafter: VllmConfig) -> tuple[bool, str]:
    """Whether the drafter would accept the target, and why not, or the notice about their vocabularies."""
    model = drafter.model_config
    tokens, stand_in = read_vocabulary(model)
    welcome = Welcome(PROTOCOL_VERSION, model.get_vocab_size(), fingerprint(tokens), model.max_model_len, 0, 0)
    answer = greet(_hello(config, target), welcome, tokens, stand_in)
    return (False, answer.reason) if isinstance(answer, Refused) else (True, answer.notice)
