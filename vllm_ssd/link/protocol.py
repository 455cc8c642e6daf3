"""The messages between a target and its drafter.

Every message is a msgpack array; the members of a union start with a numeric type tag. A request's clock is its
committed length: the number of tokens, including the prompt, that no later event can take back. Its epoch counts how
often it was opened, so that messages about an earlier incarnation are recognised and dropped. Fields may be appended to
a message: decoders ignore unknown ones, so that a `Hello` of another version can still be answered with a `Refused`.
"""

from __future__ import annotations

import functools
import hashlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, NamedTuple, TypeVar

import msgspec
import numpy as np

PROTOCOL_VERSION = 2

MAX_BLOCKS = 1 << 16
"""Most speculation blocks in a push; a push with more is refused before its blocks are decoded."""
MAX_EVICTED = 1 << 18
"""Most evictions in a push; the drafter answers every outcome of a request it has lost with one."""

MAX_VOCAB_SIZE = 1 << 22
"""Most token strings in a `Hello`."""

MAX_ALLOWED_ID = 1 << 18
MAX_BIASED = 1024
"""Limits of a `Bias`: token ids in its bit mask are below the first, and it has at most so many biased ids."""

JIT_TOKEN = -1
"""Bonus token id of the branch that continues the committed tokens themselves, at accept length 0."""

TokenId = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
Count = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]
NonNegative = Annotated[float, msgspec.Meta(ge=0)]  # refuses NaN too
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]

Proposal = tuple[np.ndarray, np.ndarray]
"""The distribution that a draft was drawn from: token ids `[M]` int32 and probabilities `[M]` float32."""


class ProtocolError(ValueError):
    """Raised for bytes that are not a message of this protocol."""


class _Message(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Base class of messages; they cannot form reference cycles, so the garbage collector need not track them."""


class Hello(_Message, frozen=True, tag=0):
    """Target → drafter, first message: what both sides must agree on.

    tokenizer: fingerprint of the target's vocabulary; not compared if empty
    vocabulary: string of each token id, "" for an id without one; needed if the fingerprints differ
    heterogeneous_vocab: whether tokens may be matched by their strings if their ids differ
    max_num_seqs: the target's maximum number of concurrent requests
    max_branches, max_support: largest number of branches per request, and of token ids per proposal, that the target
        accepts; 0 if the target started the drafter and passed them as options
    """

    version: int
    vocab_size: Count
    num_speculative_tokens: Count
    tokenizer: str
    vocabulary: Annotated[list[str], msgspec.Meta(max_length=MAX_VOCAB_SIZE)] = []
    heterogeneous_vocab: bool = False
    max_num_seqs: Count = 0
    max_branches: Count = 0
    max_support: Count = 0


class Welcome(_Message, frozen=True, tag=0):
    """Drafter → target, answering `Hello`: the drafter is ready.

    num_pages, page_size: KV pages, and tokens per page
    weight_bytes, kv_bytes, logit_bytes: device memory of the weights, the KV pages, and a step's logits at most
    notice: one sentence for the log about how the vocabularies match; empty if they are equal
    """

    version: int
    vocab_size: Count
    tokenizer: str
    max_model_len: Count
    num_pages: Count
    page_size: Count
    weight_bytes: Count = 0
    kv_bytes: Count = 0
    logit_bytes: Count = 0
    notice: str = ""


class Bias(_Message, frozen=True):
    """A request's logit bias, applied before temperature.

    allowed: bit mask of the token ids that may be sampled, as by `np.packbits`; ids beyond its end are not allowed;
        empty allows all
    token_ids, values: int32 and float32 little-endian, the ids to bias and what to add to their logits
    """

    allowed: Annotated[bytes, msgspec.Meta(max_length=MAX_ALLOWED_ID // 8)] = b""
    token_ids: Annotated[bytes, msgspec.Meta(max_length=4 * MAX_BIASED)] = b""
    values: Annotated[bytes, msgspec.Meta(max_length=4 * MAX_BIASED)] = b""


NO_BIAS = Bias()


class Truncation(_Message, frozen=True):
    """A request's sampling parameters that truncate its distribution: min_p, then top_k (0 for all), then top_p.

    bias: applied to the logits before any truncation
    """

    top_k: Count = 0
    top_p: Share = 1.0
    min_p: Share = 0.0
    bias: Bias = NO_BIAS


ALL_TOKENS = Truncation()
"""No truncation."""


class Noise(_Message, frozen=True):
    """The random numbers with which the target draws a request's bonus tokens, so that the drafter can foresee them.

    kind: `UNKNOWN_NOISE`, `HASHED_NOISE` or `SEEDED_NOISE`, see `drafter.noise`
    seed: of the request
    """

    kind: Annotated[int, msgspec.Meta(ge=0, le=2)] = 0
    seed: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)] = 0


UNKNOWN_NOISE, HASHED_NOISE, SEEDED_NOISE = range(3)
"""Kinds of `Noise`: that of an unknown generator, of vLLM's V2 runner, and of a generator seeded before each round."""
NO_NOISE = Noise()


class Refused(_Message, frozen=True, tag=1):
    """Drafter → target, instead of `Welcome`: why the drafter will not serve, in one sentence for the user."""

    reason: str


class Open(_Message, frozen=True, tag=0):
    """A request starts, or starts again after an eviction; its committed length is the number of tokens.

    token_ids: all committed tokens, int32 little-endian (see `pack_ids`)
    temperature: 0 for greedy requests, whose branches carry no q
    truncation: how to truncate the proposal, which matches the request's own truncation
    cache_salt: the prefix cache's salt; cached KV is shared only between requests with the same salt
    noise: what the target will draw bonus tokens with, if that is known
    """

    request_id: str
    epoch: Count
    token_ids: bytes
    temperature: NonNegative
    truncation: Truncation = ALL_TOKENS
    cache_salt: bytes = b""
    noise: Noise = NO_NOISE


class Outcome(_Message, frozen=True, tag=1):
    """The outcome of a request's round; its next round begins.

    length: committed length, including `emitted`
    emitted: tokens committed since this request's previous event
    draft_token_ids: the drafts that the next round verifies, whatever proposed them
    jit: number of just-in-time drafts wanted for that round; `draft_token_ids` is then empty, and a second `Outcome`
        with nothing emitted carries the drafts that were used
    """

    request_id: str
    epoch: Count
    length: Count
    emitted: list[TokenId]
    draft_token_ids: list[TokenId]
    jit: Count = 0


class Close(_Message, frozen=True, tag=2):
    """A request has ended."""

    request_id: str


class Step(_Message, frozen=True, tag=1):
    """Target → drafter, once per target step: its events, and the number of drafts wanted in each following round."""

    events: list[Open | Outcome | Close]
    num_speculative_tokens: Count


class SpeculationBlock(_Message, frozen=True):
    """New or longer branches of one request for the round that began at committed length `length`.

    Append-only: tokens sent for an outcome never change; a later block adds the tokens from depth `offset` on.

    outcomes: [n, 2] int32 little-endian, accept length and bonus token of each branch; accept length 0 with
        `JIT_TOKEN` continues the committed tokens themselves
    draft_token_ids: [n, d] int32 little-endian, the tokens after each outcome
    sampled: whether each token has a proposal among those of the push; false for greedy requests
    """

    request_id: str
    epoch: Count
    length: Count
    offset: Count
    outcomes: bytes
    draft_token_ids: bytes
    sampled: bool = False

    @property
    def num_branches(self) -> int:
        """Number of branches n."""
        return len(self.outcomes) // 8

    @property
    def num_proposals(self) -> int:
        """Number of proposals: n * d if the request is sampled, else 0."""
        return len(self.draft_token_ids) // 4 if self.sampled else 0

    @property
    def fits(self) -> bool:
        """Whether the sizes of the arrays are consistent; always true of blocks from a correct drafter."""
        size, tokens = len(self.outcomes), len(self.draft_token_ids)
        return size > 0 and not size % 8 and tokens > 0 and not 2 * tokens % size

    def find(self, accept_length: int, bonus_token_id: int) -> int:
        """Index of the branch that predicts this outcome, or -1."""
        needle = _outcome.pack(accept_length, bonus_token_id)
        at = self.outcomes.find(needle)
        while at % 8 > 0:  # a match that spans two outcomes, or none: -1 % 8 is 7
            if at < 0:
                return -1
            at = self.outcomes.find(needle, at + 1)
        return at // 8

    def drafts(self, branch: int) -> list[int]:
        """The d tokens of one branch."""
        size = 8 * len(self.draft_token_ids) // len(self.outcomes)
        return list(_token_ids(size // 4).unpack_from(self.draft_token_ids, branch * size))


class Evicted(_Message, frozen=True):
    """The drafter has dropped a request, which stays unknown until it is opened again with a later epoch."""

    request_id: str
    epoch: Count


class DrafterStats(_Message, frozen=True):
    """The drafter's gauges and running totals.

    build_ms: recent time to grow one round's branches; prompt_tokens: total length of opened requests;
    cached_tokens: the part of them found in the prefix cache
    """

    pages_free: Count
    pages_total: Count
    build_ms: NonNegative
    steps: Count
    evictions: Count
    prompt_tokens: Count = 0
    cached_tokens: Count = 0


class Push(_Message, frozen=True, tag=2):
    """Drafter → target, after each drafter step that produced something.

    The proposals of all blocks are concatenated, so that the target can check and copy them as one array:

    support: M, token ids per proposal
    q_token_ids: [E, M] int32 little-endian, proposals of the E drafts of sampled blocks, in block order; the draft
        itself comes first in each
    q_probs: [E, M] float32 little-endian, the probabilities of these ids
    """

    blocks: Annotated[list[SpeculationBlock], msgspec.Meta(max_length=MAX_BLOCKS)]
    evicted: Annotated[list[Evicted], msgspec.Meta(max_length=MAX_EVICTED)]
    stats: DrafterStats | None
    support: Count = 0
    q_token_ids: bytes = b""
    q_probs: bytes = b""

    def each(self) -> Iterator[PushedBlock]:
        """The blocks, each with the index of its first proposal."""
        first = 0
        for block in self.blocks:
            yield PushedBlock(block, self, first)
            first += block.num_proposals


class PushedBlock(NamedTuple):
    """A block with its push; first: index of the block's first proposal in the push."""

    block: SpeculationBlock
    push: Push
    first: int

    def proposals(self, branch: int) -> list[Proposal | None]:
        """The proposal of each token of a branch: ids [M] int32 and probabilities [M] float32, None if greedy."""
        depth, support = len(self.block.draft_token_ids) // (4 * self.block.num_branches), self.push.support
        if not self.block.sampled:
            return [None] * depth
        start, shape = 4 * (self.first + branch * depth) * support, (depth, support)
        ids = np.frombuffer(self.push.q_token_ids, "<i4", depth * support, start).reshape(shape)
        return list(zip(ids, np.frombuffer(self.push.q_probs, "<f4", depth * support, start).reshape(shape)))

    def proposal_bytes(self) -> tuple[bytes, bytes]:
        """The block's part of the push's `q_token_ids` and `q_probs`."""
        size = 4 * self.push.support
        part = slice(size * self.first, size * (self.first + self.block.num_proposals))
        return self.push.q_token_ids[part], self.push.q_probs[part]


ToDrafter = Hello | Step
ToTarget = Welcome | Refused | Push
M = TypeVar("M")

_outcome = struct.Struct("<ii")


@functools.cache
def _token_ids(count: int) -> struct.Struct:
    return struct.Struct(f"<{count}i")


_encoder = msgspec.msgpack.Encoder()
_to_drafter: msgspec.msgpack.Decoder[ToDrafter] = msgspec.msgpack.Decoder(ToDrafter)
_to_target: msgspec.msgpack.Decoder[ToTarget] = msgspec.msgpack.Decoder(ToTarget)


def encode(message: ToDrafter | ToTarget) -> bytes:
    """Encode one message."""
    return _encoder.encode(message)


def decode_to_drafter(data: bytes | bytearray | memoryview) -> ToDrafter:
    """Decode a message from the target; raises ProtocolError for anything else."""
    message = _decode(_to_drafter, data)
    for event in message.events if isinstance(message, Step) else ():
        if isinstance(event, Open) and len(event.token_ids) and unpack_ids(event.token_ids).min() < 0:
            raise ProtocolError(f"not a message: a negative token id in the prompt of {event.request_id!r}")
    return message


def decode_to_target(data: bytes | bytearray | memoryview) -> ToTarget:
    """Decode a message from the drafter; raises ProtocolError for anything else."""
    return _decode(_to_target, data)


def _decode(decoder: msgspec.msgpack.Decoder[M], data: bytes | bytearray | memoryview) -> M:
    try:
        return decoder.decode(data)
    except (ValueError, RecursionError) as error:  # msgspec's own errors and bad UTF-8 are ValueErrors
        raise ProtocolError(f"not a message: {error}") from error


def pack_ids(token_ids: Sequence[int] | np.ndarray) -> bytes:
    """Token ids of any shape as int32 little-endian, in C order."""
    return np.asarray(token_ids, dtype="<i4").tobytes()


def pack_bias(allowed: Sequence[int], biases: Mapping[int, float]) -> Bias:
    """Build a `Bias` from the ids that may be sampled (empty: all) and the bias by token id.

    Returns `NO_BIAS` if it would exceed the limits; the request is then drafted without it.
    """
    if len(biases) > MAX_BIASED or max(allowed, default=0) >= MAX_ALLOWED_ID:
        return NO_BIAS
    bits = np.zeros(max(allowed, default=-1) + 1, bool)
    bits[np.array(allowed, np.int64)] = True
    values = np.array(list(biases.values()), "<f4").tobytes()
    return Bias(np.packbits(bits).tobytes(), pack_ids(list(biases)), values)


def unpack_ids(data: bytes) -> np.ndarray:
    """The flat, read-only int32 array that `pack_ids` packed; raises ProtocolError if bytes are left over."""
    if len(data) % 4:
        raise ProtocolError(f"{len(data)} bytes are not a whole number of int32 token ids")
    return np.frombuffer(data, dtype="<i4")


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of leading tokens that two lists share."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    for i, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return i
    return n


def fingerprint(tokens: Sequence[str]) -> str:
    """Hash of a vocabulary, equal for the same strings at the same ids: 16 hex digits, "" for no tokens."""
    return hashlib.sha256(msgspec.msgpack.encode(tokens)).hexdigest()[:16] if tokens else ""
