"""The handshake of a target and its drafter, held between two configurations."""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.tokenizers import get_tokenizer

from vllm_ssd.config import SSDConfig
from vllm_ssd.drafter.server import _shake_hands
from vllm_ssd.link.protocol import PROTOCOL_VERSION, Refused, Welcome, fingerprint
from vllm_ssd.link.transport import ProcessTransport, socket_pair
from vllm_ssd.target.start import _hello


def refusal(config: SSDConfig, target: VllmConfig, drafter: VllmConfig) -> str | None:
    """Why the drafter would refuse the target, in its own words; None where it would not."""
    model = drafter.model_config
    vocab = get_tokenizer(
        model.tokenizer, trust_remote_code=model.trust_remote_code, revision=model.revision
    ).get_vocab()
    welcome = Welcome(PROTOCOL_VERSION, model.get_vocab_size(), fingerprint(vocab), model.max_model_len, 0, 0)
    target_end, socket = socket_pair()
    drafter_end = ProcessTransport.from_fd(socket.detach(), "drafter")
    try:
        target_end.send(_hello(config, target))
        _shake_hands(drafter_end, welcome)
        (answer,) = target_end.poll(1.0)
    finally:
        target_end.close()
        drafter_end.close()
    return answer.reason if isinstance(answer, Refused) else None
