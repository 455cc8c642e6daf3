"""The messages between a target and its drafter.

Every message is a msgpack array; those that can meet in one place start with a number that names their type. The clock
is a request's committed length: the number of tokens, prompt included, that no later event can take back. An epoch
counts how often a request was opened, so that news of a lost incarnation is recognised and dropped. Fields may be added
at the end of a message: decoders ignore what they do not know, so a `Hello` of another version can be refused in words.
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
"""Most speculation blocks in a push; one with more is refused before they are decoded."""
MAX_EVICTED = 1 << 18
"""Most evictions in a push: every outcome of a request the drafter has lost is answered by one."""

MAX_VOCAB_SIZE = 1 << 22
"""Most token strings in a `Hello`."""

MAX_ALLOWED_ID = 1 << 18
MAX_BIASED = 1024
"""Of a `Bias`: its bits go up to this token id, and so many ids have a value of their own."""

JIT_TOKEN = -1
"""Bonus token id of the branch that continues the committed tokens themselves, at accept length 0."""

TokenId = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
Count = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]
NonNegative = Annotated[float, msgspec.Meta(ge=0)]  # refuses NaN too
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]

Proposal = tuple[np.ndarray, np.ndarray]
"""The distribution a draft was drawn from: token ids `[M]` int32 and probabilities `[M]` float32."""


class ProtocolError(ValueError):
    """Bytes that are no message of this protocol."""


class _Message(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """No message can be part of a reference cycle, so none is worth the garbage collector's time."""


class Hello(_Message, frozen=True, tag=0):
    """Target → drafter, first: what both sides must agree on. An empty `tokenizer` is not compared.

    vocabulary: the string of each token id, "" for an id without one; needed where the fingerprints differ
    heterogeneous_vocab: whether tokens may be matched by their strings, with unlike ids
    max_num_seqs: requests that the target has at most at a time
    max_branches, max_support: the most branches of a request, and ids in the proposal of a draft, that it takes; 0 of a
        target that has started the drafter and told it
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
    """Drafter → target, answering `Hello`: the drafter is ready; its capacity in tokens is pages times page size.

    weight_bytes, kv_bytes: of its device's memory; logit_bytes: what a step's logits take at most
    notice: how the vocabularies fit together, in one sentence for the log; empty where they are equal
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
    """What a request adds to the logits, before its temperature divides them.

    allowed: the token ids that it may sample, a bit each as `np.packbits` has them, no id beyond; empty for all ids
    token_ids, values: int32 and float32 little-endian, what is added to the logits of some ids
    """

    allowed: Annotated[bytes, msgspec.Meta(max_length=MAX_ALLOWED_ID // 8)] = b""
    token_ids: Annotated[bytes, msgspec.Meta(max_length=4 * MAX_BIASED)] = b""
    values: Annotated[bytes, msgspec.Meta(max_length=4 * MAX_BIASED)] = b""


NO_BIAS = Bias()


class Truncation(_Message, frozen=True):
    """Which tokens a request samples from, of the distribution at its temperature.

    min_p: those at least so likely as this share of the likeliest; top_k: of these the k likeliest, 0 for all; top_p:
    of these the fewest likeliest that hold so much of their probability; bias: which it prefers before any of that
    """

    top_k: Count = 0
    top_p: Share = 1.0
    min_p: Share = 0.0
    bias: Bias = NO_BIAS


ALL_TOKENS = Truncation()
"""No token is cut off."""


class Refused(_Message, frozen=True, tag=1):
    """Drafter → target, instead of `Welcome`: why there will be no drafter, in one sentence for the user."""

    reason: str


class Open(_Message, frozen=True, tag=0):
    """A request starts, or starts again after an eviction; its committed length is the number of tokens.

    token_ids: all committed tokens, int32 little-endian (see `pack_ids`)
    temperature: 0 for greedy requests, whose branches carry no q
    truncation: which tokens the request can sample, as the proposal is cut, too
    cache_salt: of the prefix cache; the KV of one salt is never read for another
    """

    request_id: str
    epoch: Count
    token_ids: bytes
    temperature: NonNegative
    truncation: Truncation = ALL_TOKENS
    cache_salt: bytes = b""


class Outcome(_Message, frozen=True, tag=1):
    """A request's round is decided and its next one begins.

    length: committed length after `emitted`
    emitted: tokens committed since the previous event of this request
    draft_token_ids: the drafts now being verified, whatever proposed them
    jit: number of drafts wanted just in time for this very round; `draft_token_ids` is then empty, and a second
        `Outcome` with nothing emitted names the drafts that were taken
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
    """Target → drafter, once a target step: its events, and the number of drafts wanted for each coming round."""

    events: list[Open | Outcome | Close]
    num_speculative_tokens: Count


class SpeculationBlock(_Message, frozen=True):
    """New or longer branches of one request for the round that began at committed length `length`.

    Append-only: what was sent for an outcome never changes, a later block adds the tokens from depth `offset` on.

    outcomes: [n, 2] int32 little-endian, accept length and bonus token of each branch; accept length 0 with
        `JIT_TOKEN` continues the committed tokens themselves
    draft_token_ids: [n, d] int32 little-endian, the tokens after each outcome
    sampled: whether each token has a proposal, n * d of those of the push; a greedy request's has none
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
        """n."""
        return len(self.outcomes) // 8

    @property
    def num_proposals(self) -> int:
        """n * d where the request is sampled."""
        return len(self.draft_token_ids) // 4 if self.sampled else 0

    @property
    def fits(self) -> bool:
        """Whether the arrays have the sizes that n and d ask for; of a sound drafter they always do."""
        size, tokens = len(self.outcomes), len(self.draft_token_ids)
        return size > 0 and not size % 8 and tokens > 0 and not 2 * tokens % size

    def find(self, accept_length: int, bonus_token_id: int) -> int:
        """The branch that predicts this outcome, or -1."""
        needle = _outcome.pack(accept_length, bonus_token_id)
        at = self.outcomes.find(needle)
        while at % 8 > 0:  # a match across two outcomes; -1 % 8 is 7, so the end is told apart below
            if at < 0:
                return -1
            at = self.outcomes.find(needle, at + 1)
        return at // 8

    def drafts(self, branch: int) -> list[int]:
        """The d tokens of one branch."""
        size = 8 * len(self.draft_token_ids) // len(self.outcomes)
        return list(_token_ids(size // 4).unpack_from(self.draft_token_ids, branch * size))


class Evicted(_Message, frozen=True):
    """The drafter has lost a request and forgets it until it is opened again with a later epoch."""

    request_id: str
    epoch: Count


class DrafterStats(_Message, frozen=True):
    """The drafter's gauges and running totals; `build_ms` is the recent time of growing one round's branches.

    prompt_tokens: of the requests that were opened; cached_tokens: those of them whose KV was there already.
    """

    pages_free: Count
    pages_total: Count
    build_ms: NonNegative
    steps: Count
    evictions: Count
    prompt_tokens: Count = 0
    cached_tokens: Count = 0


class Push(_Message, frozen=True, tag=2):
    """Drafter → target, after each drafter step that has news.

    The proposals of all blocks lie together, so that the target can check them and copy them as one array:

    support: M, ids in each proposal
    q_token_ids: [E, M] int32 little-endian, the support of the E drafts of sampled blocks, in the blocks' order, each
        draft first
    q_probs: [E, M] float32 little-endian, their probabilities
    """

    blocks: Annotated[list[SpeculationBlock], msgspec.Meta(max_length=MAX_BLOCKS)]
    evicted: Annotated[list[Evicted], msgspec.Meta(max_length=MAX_EVICTED)]
    stats: DrafterStats | None
    support: Count = 0
    q_token_ids: bytes = b""
    q_probs: bytes = b""

    def each(self) -> Iterator[PushedBlock]:
        """Its blocks, each with its place in the proposals."""
        first = 0
        for block in self.blocks:
            yield PushedBlock(block, self, first)
            first += block.num_proposals


class PushedBlock(NamedTuple):
    """A block and the push that it came in, of whose E drafts with a proposal `first` is the block's first."""

    block: SpeculationBlock
    push: Push
    first: int

    def proposals(self, branch: int) -> list[Proposal | None]:
        """Of each token of one branch, ids [M] int32 and probabilities [M] float32, or None where there is none."""
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
    """The bytes of one message."""
    return _encoder.encode(message)


def decode_to_drafter(data: bytes | bytearray | memoryview) -> ToDrafter:
    """The message that the target sent; raises ProtocolError for anything else."""
    message = _decode(_to_drafter, data)
    for event in message.events if isinstance(message, Step) else ():
        if isinstance(event, Open) and len(event.token_ids) and unpack_ids(event.token_ids).min() < 0:
            raise ProtocolError(f"not a message: a negative token id in the prompt of {event.request_id!r}")
    return message


def decode_to_target(data: bytes | bytearray | memoryview) -> ToTarget:
    """The message that the drafter sent; raises ProtocolError for anything else."""
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
    """The `Bias` of a request that may sample the ids `allowed`, all if there are none, and adds `biases` by id.

    One that would be too long is `NO_BIAS`: drafts are then made without it.
    """
    if len(biases) > MAX_BIASED or max(allowed, default=0) >= MAX_ALLOWED_ID:
        return NO_BIAS
    bits = np.zeros(max(allowed, default=-1) + 1, bool)
    bits[np.array(allowed, np.int64)] = True
    values = np.array(list(biases.values()), "<f4").tobytes()
    return Bias(np.packbits(bits).tobytes(), pack_ids(list(biases)), values)


def unpack_ids(data: bytes) -> np.ndarray:
    """The flat, read-only int32 array that `pack_ids` packed; raises ProtocolError when bytes are left over."""
    if len(data) % 4:
        raise ProtocolError(f"{len(data)} bytes are not a whole number of int32 token ids")
    return np.frombuffer(data, dtype="<i4")


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of leading tokens that two lists share: how far emitted tokens follow a speculation."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    for i, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return i
    return n


def fingerprint(tokens: Sequence[str]) -> str:
    """16 hex digits that two vocabularies share when they have the same strings for the same ids; "" for no tokens."""
    return hashlib.sha256(msgspec.msgpack.encode(tokens)).hexdigest()[:16] if tokens else ""
