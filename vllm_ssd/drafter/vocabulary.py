"""Wrap the draft model so that it appears to have the target's vocabulary.

Everything in the drafter but the model itself uses the target's token ids. A target id is *shared* if the draft model
has the same token: under the same id or, with `heterogeneous_vocab`, under any id with the same string. Only shared ids
are drafted: the logits of all others are -inf before anything is drawn, so a proposal is exactly the distribution that
its drafts were drawn from. Tokens of the text that the draft model lacks are replaced by a stand-in: its unknown token
or, without one, its end-of-text token.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch

from vllm_ssd.compat.drafter.paged import ForwardBatch, PagedModel, TreeBatch

MIN_SHARED = 0.99
"""Share of the target's tokens that must have the same ids in the draft model for both to count as having the same
tokenizer, apart from added tokens."""


class UnlikeVocabularies(ValueError):
    """Raised if the vocabularies of target and draft model do not match."""


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """A model's vocabulary.

    size: number of token ids; tokens: their strings, "" or missing for ids without one; empty without a tokenizer.
    """

    size: int
    tokens: Sequence[str] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class VocabularyMap:
    """Maps a target's token ids to the draft model's.

    draft_token_ids [V] int32: draft id of each target id, the stand-in if it has none; shared [V] bool: which target
    ids may be drafted; notice: one sentence on how many these are, empty if the vocabularies are equal.
    """

    draft_token_ids: np.ndarray
    shared: np.ndarray
    notice: str = ""

    @property
    def num_shared(self) -> int:
        """Number of target ids that may be drafted."""
        return int(self.shared.sum())


def match(target: Vocabulary, draft: Vocabulary, stand_in: int, heterogeneous: bool) -> VocabularyMap:
    """Map the target's ids to the draft model's; raises UnlikeVocabularies if too few match.

    stand_in: draft id for tokens that the draft model lacks; heterogeneous: match by string if the ids differ.
    """
    common = min(target.size, draft.size)
    same = np.zeros(target.size, bool)
    same[:common] = True
    if not target.tokens or not draft.tokens:
        if common < MIN_SHARED * max(target.size, draft.size):
            raise UnlikeVocabularies(
                f"the target's vocabulary has {target.size:,} ids, the draft model's {draft.size:,}, and without both "
                "tokenizers it is unknown which of them are the same tokens"
            )
        what = f"its first {common:,} ids, as far as is known without both tokenizers,"
        return _map(np.arange(common), same, stand_in, "" if target.size == draft.size else what)
    ours, theirs = _padded(target.tokens, common), _padded(draft.tokens, common)
    same[:common] = np.fromiter((a == b for a, b in zip(ours, theirs)), bool, common)
    named = np.fromiter(map(bool, _padded(target.tokens, target.size)), bool, target.size)
    num_named, num_same = int(named.sum()), int((same & named).sum())
    if num_same >= MIN_SHARED * num_named:
        is_equal = same.all() and target.size == draft.size
        return _map(np.arange(common), same, stand_in, "" if is_equal else _share(num_same, num_named))
    if not heterogeneous:
        raise UnlikeVocabularies(
            f"the draft model has only {_share(num_same, num_named)} under the same ids; to draft with the tokens that "
            "both have under any id, set heterogeneous_vocab: true"
        )
    draft_token_ids = _by_string(target, draft)
    same = draft_token_ids >= 0
    if not same.any():
        raise UnlikeVocabularies("no token of the target has the same string as a token of the draft model")
    return _map(draft_token_ids, same, stand_in, _share(int(same.sum()), num_named))


def _padded(tokens: Sequence[str], size: int) -> list[str]:
    return [*tokens[:size], *[""] * (size - len(tokens))]


def _share(num: int, num_named: int) -> str:
    return f"{num:,} of the target's {num_named:,} tokens ({num / max(num_named, 1):.1%})"


def _map(draft_token_ids: np.ndarray, shared: np.ndarray, stand_in: int, what: str) -> VocabularyMap:
    found = np.full(len(shared), stand_in, np.int32)
    found[: len(draft_token_ids)] = draft_token_ids
    found[~shared] = stand_in
    return VocabularyMap(found, shared, what and f"the draft model shares {what} with the target")


def _by_string(target: Vocabulary, draft: Vocabulary) -> np.ndarray:
    """The draft id of each target id with the same text, -1 if there is none, [V] int64."""
    ids: dict[bytes, int] = {}
    for token_id, text in enumerate(texts(draft.tokens[: draft.size])):
        ids.setdefault(text, token_id)
    ids.pop(b"", None)
    found = np.full(target.size, -1, np.int64)
    for token_id, text in enumerate(texts(target.tokens[: target.size])):
        found[token_id] = ids.pop(text, -1)  # only the first target id with a text gets a draft id
    return found


def texts(tokens: Sequence[str]) -> list[bytes]:
    """The bytes that each token of a vocabulary stands for, independent of its tokenizer's notation.

    Byte-level tokenizers write each byte as one character, for example a space as "Ġ"; SentencePiece writes a space as
    "▁" and single bytes as "<0x0A>". Other tokens, such as "<|end|>", are taken literally.
    """
    present = set(tokens)
    if {"Ġ", "Ċ"} <= present:
        return [_byte_level(token) for token in tokens]
    if "▁" in present:
        return [_sentence_piece(token) for token in tokens]
    return [token.encode() for token in tokens]


def _byte_characters() -> dict[str, int]:
    """The character table of byte-level tokenizers (GPT-2): printable bytes map to themselves, others to U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_characters()


def _byte_level(token: str) -> bytes:
    try:
        return bytes([_BYTES[character] for character in token])
    except KeyError:
        return token.encode()


def _sentence_piece(token: str) -> bytes:
    byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token, re.ASCII)
    if byte is not None:
        return bytes([int(byte[1], 16)])
    return token.replace("▁", " ").encode()


def translated(model: PagedModel, vocabulary: VocabularyMap) -> PagedModel:
    """Wrap `model` to use the target's vocabulary; returns `model` itself if the vocabularies are equal."""
    identity = np.arange(model.vocab_size)
    if vocabulary.shared.all() and np.array_equal(vocabulary.draft_token_ids, identity):
        return model
    return cast("PagedModel", _TranslatedModel(model, vocabulary))


class _TranslatedModel:
    """A draft model that takes the target's ids and returns logits over them, -inf for ids that are not shared.

    If all shared ids are equal in both models, the logits are a slice of the draft model's, as wide as the smaller
    vocabulary. If ids are translated, the mask token has the id after the target's last one.
    """

    def __init__(self, model: PagedModel, vocabulary: VocabularyMap) -> None:
        self._model = model
        self.vocab_size = len(vocabulary.draft_token_ids)
        ids, shared = vocabulary.draft_token_ids, vocabulary.shared
        self.mask_token_id = model.mask_token_id
        own_ids = np.arange(len(ids))
        self._width = min(len(ids), model.vocab_size)
        self._on_host = ids
        self._table = self._gathered = None
        if not np.array_equal(ids, own_ids):
            if model.mask_token_id is not None:
                self.mask_token_id = len(ids)
                self._on_host = np.append(ids, np.int32(model.mask_token_id))
            self._table = torch.from_numpy(self._on_host).to(model.device)
        if not np.array_equal(ids[shared], own_ids[shared]):
            self._gathered, self._width = torch.from_numpy(ids).to(model.device), len(ids)
        unshared = np.flatnonzero(~shared[: self._width])
        self._unshared = torch.from_numpy(unshared).to(model.device) if len(unshared) else None

    def __getattr__(self, name: str) -> object:
        return getattr(self._model, name)

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch | TreeBatch) -> torch.Tensor:
        """See `PagedModel.forward`, with the target's ids; safe to capture in a CUDA graph."""
        if self._table is not None:
            if isinstance(batch, TreeBatch):
                token_ids = self._table.index_select(0, batch.token_ids)
            else:
                token_ids = self._on_host[batch.token_ids]
            batch = dataclasses.replace(batch, token_ids=token_ids)
        logits = self._model.forward(batch)
        if self._gathered is None:
            logits = logits[:, : self._width]
        else:
            logits = logits.index_select(1, self._gathered)
        return logits if self._unshared is None else logits.index_fill_(1, self._unshared, float("-inf"))
