"""The drafter's process: boot the model, shake hands, then serve one target until it disconnects."""

from __future__ import annotations

import functools
import gc
import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, cast

import msgspec
import torch

from vllm_ssd.compat.drafter.memory import max_rows
from vllm_ssd.compat.drafter.paged import PagedModel, UnsupportedDraftModel
from vllm_ssd.drafter.biases import Biases
from vllm_ssd.drafter.branches import Branches
from vllm_ssd.drafter.buckets import MAX_BRANCHES
from vllm_ssd.drafter.device_steps import MAX_TOP_M, DeviceSteps
from vllm_ssd.drafter.engine import PREFILL_TOKENS_PER_STEP, DraftEngine
from vllm_ssd.drafter.heartbeat import Heartbeat
from vllm_ssd.drafter.merging import MergedOutcome
from vllm_ssd.drafter.pages.device import DevicePages
from vllm_ssd.drafter.pages.host import HostPages
from vllm_ssd.drafter.pages.protocol import Pages
from vllm_ssd.drafter.sampler import Sampler
from vllm_ssd.drafter.self_check import TIME_LIMIT_S, check_forward, check_trees, time_limit
from vllm_ssd.drafter.stepper import EagerRunner, Runner, Stepper
from vllm_ssd.drafter.trace import TracedEngine, TracedFanOut, TracedTransport
from vllm_ssd.drafter.vocabulary import UnlikeVocabularies, Vocabulary, VocabularyMap, match, translated
from vllm_ssd.link.checks import max_step_bytes
from vllm_ssd.link.environment import forget_loading
from vllm_ssd.link.options import DrafterOptions
from vllm_ssd.link.protocol import (
    PROTOCOL_VERSION,
    Close,
    Hello,
    Open,
    Outcome,
    ProtocolError,
    Push,
    Refused,
    Step,
    Welcome,
    fingerprint,
    unpack_ids,
)
from vllm_ssd.link.timeline import TRACE_ENV, Timeline
from vllm_ssd.link.transport import Transport, TransportClosed
from vllm_ssd.policy import BranchBudget, FanOut

logger = logging.getLogger("vllm.vllm_ssd")

STATS_INTERVAL_S = 1.0
"""Interval at which statistics are sent while anything changes; they are also sent when the last request closes. A
drafter that got a message thus answers within this time, and silence means that it hangs."""


def serve(transport: Transport, engine: DraftEngine) -> None:
    """Apply the target's events and push the engine's drafts, until the transport closes."""
    reported_at, changed = time.monotonic(), False  # since the stats were sent
    while True:
        messages = transport.poll(0.0 if engine.has_work else (STATS_INTERVAL_S if changed else None))
        for step in messages:
            for event in step.events if isinstance(step, Step) else ():
                apply(engine, event, step.num_speculative_tokens)
        changed = changed or bool(messages) or engine.has_work
        push = engine.speculate() if engine.has_work else None
        now = time.monotonic()
        if changed and (now - reported_at >= STATS_INTERVAL_S or not engine.sequences):
            push = msgspec.structs.replace(push or Push([], [], None), stats=engine.stats())
            reported_at, changed = now, False
        if push is not None:
            transport.send(push)


def apply(engine: DraftEngine, event: Open | Outcome | Close, num_drafts: int) -> None:
    """Apply one event of a target's step to the engine."""
    match event:
        case Outcome():
            engine.advance(
                event.request_id,
                event.epoch,
                event.length,
                event.emitted,
                event.draft_token_ids,
                num_drafts=num_drafts,
                jit=event.jit,
                rounds=event.rounds if isinstance(event, MergedOutcome) else (),
            )
        case Open():
            try:
                token_ids = unpack_ids(event.token_ids)
            except ProtocolError:
                engine.refuse(event.request_id, event.epoch)
            else:
                engine.open(
                    event.request_id,
                    event.epoch,
                    token_ids,
                    event.temperature,
                    num_drafts,
                    event.truncation,
                    event.cache_salt,
                    event.noise,
                )
        case Close():
            engine.close(event.request_id)


@dataclass(frozen=True, slots=True)
class Booted:
    """A loaded and checked draft model, with the strings of its tokens.

    stand_in: draft token id that replaces target tokens which the draft model lacks
    captured: steps that have been warmed up, reusable if the vocabularies are equal
    welcome: its answer to every handshake
    """

    model: PagedModel
    options: DrafterOptions
    tokens: list[str]
    stand_in: int
    captured: Steps
    welcome: Welcome

    def greet(self, hello: object) -> VocabularyMap | Refused:
        """Map the vocabulary of a target to the draft model's, or say why the target cannot be served."""
        return greet(hello, self.welcome, self.tokens, self.stand_in)

    def engine(self, vocabulary: VocabularyMap, learner: Callable[..., FanOut] = FanOut) -> DraftEngine:
        """Build an engine that drafts in the target's ids, with its steps captured."""
        served = translated(self.model, vocabulary)
        steps = self.captured
        if served is not self.model:
            steps = _steps_of(served, self.options, vocabulary.num_shared)
        engine = _engine_of(served, self.options, learner, steps)
        num_captured = engine.warm_up() if self.options.graphs else 0  # steps that are captured already are reused
        logger.info("SSD: the drafter captured its steps for %d batch sizes", num_captured)
        return engine

    @property
    def max_step_bytes(self) -> int:
        """Upper bound on the size of a target's steps."""
        return max_step_bytes(self.welcome.max_model_len, self.options.max_num_seqs)


def boot(place: int | str, options: DrafterOptions, refuse: Callable[[Exception], None]) -> Booted:
    """Load and check the draft model; if an optional feature fails, restart the process without it.

    place: the socket's descriptor or the address from the process's command line
    refuse: called with an exception before it is raised
    """
    environment = dict(os.environ)  # a copy, since vLLM's startup adds variables
    try:
        from vllm_ssd.compat.drafter.draft_model import DraftModel

        num_drafts = options.num_speculative_tokens
        model = DraftModel(tree_attention=options.tree_attention, num_drafts=num_drafts, **options.engine_args)
        tokens, stand_in = model.vocabulary()
    except Exception as error:  # whatever vLLM's startup raises becomes the target's error message
        if options.tree_attention and not isinstance(error, UnsupportedDraftModel):
            _start_over(place, options, environment, error)
        refuse(error)
        raise
    try:
        with time_limit(TIME_LIMIT_S, functools.partial(_start_over, place, options, environment)):
            captured = _check(model, options)
        if not model.tree_attention:  # compiling may take longer; the target's `startup_timeout_s` bounds it
            check_forward(_engine_of(model, options, FanOut, captured), model, num_drafts)
    except Exception as error:
        if options.tree_attention or options.graphs:
            _start_over(place, options, environment, error)
        refuse(error)
        raise
    forget_loading(os.environ)
    welcome = Welcome(
        PROTOCOL_VERSION,
        model.vocab_size,
        fingerprint(tokens),
        model.max_model_len,
        model.num_pages,
        model.page_size,
        model.weight_bytes,
        model.kv_bytes,
        model.logit_bytes,
    )
    return Booted(model, options, tokens, stand_in, captured, welcome)


def run(fd: int, options: DrafterOptions) -> int:
    """Boot and serve on the connected socket `fd`; returns the process's exit status."""
    from vllm_ssd.link.transport import ProcessTransport

    transport = ProcessTransport.from_fd(fd, "drafter")
    booted = boot(fd, options, functools.partial(_refuse, transport))
    trace = os.environ.get(TRACE_ENV)
    try:
        (hello,) = transport.poll(None)[:1]
        vocabulary = booted.greet(hello)
        if isinstance(vocabulary, Refused):
            transport.send(vocabulary)
            return 1
        engine = booted.engine(vocabulary, functools.partial(TracedFanOut, trace) if trace else FanOut)
        transport.limit_messages(booted.max_step_bytes)
        transport.send(msgspec.structs.replace(booted.welcome, notice=vocabulary.notice))
        del booted, vocabulary, hello
        gc.collect()
        gc.freeze()
        heartbeat = Heartbeat(transport)
        try:
            if trace:
                timeline = Timeline(trace, "drafter")
                traced = cast(Transport, TracedTransport(heartbeat, timeline))
                serve(traced, cast(DraftEngine, TracedEngine(engine, timeline)))
            else:
                serve(heartbeat, engine)
        finally:
            heartbeat.close()
    except TransportClosed:
        return 0
    return 0


def _check(model: PagedModel, options: DrafterOptions) -> Steps:
    """Check that an engine like the one that will serve agrees with the model, and that its steps can be captured.

    This runs before the handshake, because the process cannot restart after it: the target sends only one Hello.
    -> the captured steps, for the engine that will serve if the vocabularies are equal
    """
    plain = msgspec.structs.replace(options, saguaro_c=1.0)
    steps = _steps_of(model, plain)
    if model.tree_attention:
        check_trees(_engine_of(model, plain, FanOut, steps), model, options.num_speculative_tokens)
    if options.saguaro_c != plain.saguaro_c:
        steps = _steps_of(model, options)
    if options.graphs:
        _engine_of(model, options, FanOut, steps).warm_up()
    return steps


def _refuse(transport: Transport, error: Exception) -> None:
    transport.send(Refused(f"{type(error).__name__}: {error}"))
    transport.poll(0.0)


def _start_over(place: int | str, options: DrafterOptions, environment: dict[str, str], error: Exception) -> NoReturn:
    """Restart this process without tree attention, or without CUDA graphs if tree attention is already off.

    A new process is needed because the failure may have left the device unusable, or a kernel hanging.
    """
    what, changes = ("its own attention", {"tree_attention": False})
    if not options.tree_attention:
        what, changes = ("CUDA graphs", {"graphs": False})
    reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    logger.warning("SSD: the drafter does without %s, which failed here (%s)", what, reason)
    logger.debug("SSD: the failure in full", exc_info=error)
    options = msgspec.structs.replace(options, **changes)
    for descriptor in (place, options.keeper):
        if isinstance(descriptor, int) and descriptor >= 0:
            os.set_inheritable(descriptor, True)
    arguments = ["-m", "vllm_ssd.drafter", str(place), msgspec.json.encode(options).decode()]
    os.execve(sys.executable, [sys.executable, *arguments], environment)


class Steps(NamedTuple):
    """The parts of an engine that hold no request state once it is idle, and may be passed on to another engine."""

    branches: Branches
    pages: Pages
    eager: EagerRunner
    runner: Runner
    saguaro_c: float
    most_branches: int  # of all requests, for the budget
    most_rows: int  # per step


def build_engine(model: PagedModel, fan_out: FanOut, **options: Any) -> DraftEngine:
    """Build an engine with its own steps; options: of `build_steps`."""
    return engine_over(model, fan_out, build_steps(model, **options))


def engine_over(model: PagedModel, fan_out: FanOut, steps: Steps) -> DraftEngine:
    """Build a new engine over steps that no other engine is using."""
    branches, pages = steps.branches, steps.pages
    budget = BranchBudget(steps.most_branches, branches.is_parallel)
    stepper = Stepper(branches, steps.eager, steps.runner, budget, steps.saguaro_c, steps.most_rows)
    return DraftEngine(
        fan_out,
        budget,
        branches,
        pages,
        stepper,
        vocab_size=model.vocab_size,
        max_model_len=model.max_model_len,
        prefill_tokens=PREFILL_TOKENS_PER_STEP["cuda" if _is_on_gpu(model) else "cpu"],
    )


def build_steps(
    model: PagedModel,
    *,
    num_speculative_tokens: int,
    max_num_seqs: int,
    max_branches: int,
    max_fan_out: int,
    top_m: int,
    seed: int,
    saguaro_c: float = 1.0,
    num_draftable: int | None = None,
) -> Steps:
    """Build the steps of `model`, with pages on the device if it has tree attention, else on the host.

    max_branches: per request; max_fan_out: per fork point; top_m: token ids per proposal; seed: of the draws;
    num_draftable: number of tokens with finite logits (default: all).
    """
    num_draftable = model.vocab_size if num_draftable is None else num_draftable
    num_candidates = min(max_fan_out + 1, num_draftable)  # one of them may be the draft itself
    top_m = min(top_m, num_draftable)
    if model.tree_attention:
        top_m = max(top_m, num_candidates)  # in the kernel, one top-k serves proposal and candidates
    biases = Biases(model.vocab_size, model.device)
    branches = Branches(
        max_num_seqs, max_branches + 1, num_speculative_tokens, num_candidates, top_m, biases, model.mask_token_id
    )
    sampler = Sampler(num_candidates, top_m, seed, saguaro_c)
    most_rows = max_rows(model.vocab_size, model.dtype)
    if model.tree_attention:
        pages = DevicePages(model, branches)
        runner = eager = EagerRunner(model, pages, branches, sampler)
        if top_m <= MAX_TOP_M:
            runner = DeviceSteps(model, pages, branches, top_m, seed, saguaro_c, most_rows=most_rows)
    else:
        pages = HostPages(model, branches)
        runner = eager = EagerRunner(model, pages, branches, sampler)
    # Leave room for spine tokens in the same step.
    most_branches = min(MAX_BRANCHES, 3 * most_rows // 4) if _is_on_gpu(model) else most_rows
    most_branches = max(min(max_num_seqs * max_branches, most_branches // branches.tokens_per_step), 1)
    return Steps(branches, pages, eager, runner, saguaro_c, most_branches, most_rows)


def _is_on_gpu(model: PagedModel) -> bool:
    return torch.device(model.device).type == "cuda"


def _engine_of(model: PagedModel, options: DrafterOptions, learner: Callable[..., FanOut], steps: Steps) -> DraftEngine:
    return engine_over(model, learner(options.num_speculative_tokens, options.fan_out, options.branch_budget), steps)


def _steps_of(model: PagedModel, options: DrafterOptions, num_draftable: int | None = None) -> Steps:
    return build_steps(
        model,
        num_speculative_tokens=options.num_speculative_tokens,
        max_num_seqs=options.max_num_seqs,
        max_branches=options.max_branches,
        max_fan_out=options.max_fan_out,
        top_m=options.top_m,
        saguaro_c=options.saguaro_c,
        seed=int.from_bytes(os.urandom(8), "little") >> 1,  # must be independent of verification's random numbers
        num_draftable=num_draftable,
    )


def greet(hello: object, welcome: Welcome, tokens: list[str], stand_in: int) -> VocabularyMap | Refused:
    """Map a target's vocabulary to that of the draft model with `tokens`, or say why the target is refused."""
    if not isinstance(hello, Hello) or hello.version != PROTOCOL_VERSION:
        version = getattr(hello, "version", None)
        return Refused(f"protocol version {version} of the target, {PROTOCOL_VERSION} of the drafter")
    if not hello.tokenizer or not welcome.tokenizer:
        logger.warning(
            "SSD: the tokenizers of target and draft model were not compared, as one of them has none "
            "(skip_tokenizer_init); drafts of a draft model with another tokenizer are never accepted"
        )
    elif not hello.vocabulary and hello.tokenizer != welcome.tokenizer:
        return Refused("the draft model's tokenizer differs from the target's, whose tokens are not known")
    elif not hello.vocabulary:
        hello = msgspec.structs.replace(hello, vocabulary=tokens)
    try:
        return match(
            Vocabulary(hello.vocab_size, hello.vocabulary),
            Vocabulary(welcome.vocab_size, tokens),
            stand_in,
            hello.heterogeneous_vocab,
        )
    except UnlikeVocabularies as error:
        return Refused(str(error))
