"""What the target's side does on a GPU only, under a stand-in for CUDA: devices, streams, failures."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fake_cuda import CudaError, FakeCuda, Stream
from fake_speculator import batch, built
from triton.runtime.jit import JITFunction
from v2_target import Target
from waiting import wait_until

from vllm_ssd.compat.target import runner_v1
from vllm_ssd.link.protocol import Push, SpeculationBlock, pack_ids
from vllm_ssd.target.v2 import speculator as speculator_module
from vllm_ssd.target.v2.courier import NUM_BUFFERS
from vllm_ssd.target.v2.lookup_cache import SpeculationCache

THREADS = ("ssd-courier", "ssd-outcomes")


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    with FakeCuda(num_devices=2) as cuda:
        yield cuda
        end_of_threads()


def end_of_threads() -> None:
    for thread in threading.enumerate():
        if thread.name in THREADS:
            thread.join(timeout=10)
            assert not thread.is_alive()


def decode(target: Target, rounds: int) -> None:
    """Rounds between which the courier has time."""
    for _ in range(rounds):
        target.step()
        target.drain()
        wait_until(lambda: not target.courier._tasks, pause_s=0.002)
        time.sleep(0.01)
        torch.cuda.synchronize(target.device)


def test_the_courier_touches_no_other_device(cuda: FakeCuda) -> None:
    """A context on another replica's GPU takes hundreds of MB of it."""
    target = Target(cuda, "cuda:1")
    cuda.touched.clear()
    target.courier.run()
    request = target.start([1, 2, 3])
    decode(target, 8)
    target.courier.stop()
    end_of_threads()
    assert any(request.found), "inconclusive: no block was written"
    assert cuda.touched == {("MainThread", 1), *((name, 1) for name in THREADS)}


@pytest.mark.parametrize(("call", "failing"), [("synchronize", "ssd-outcomes"), ("copy", "ssd-courier")])
def test_a_device_that_fails_ends_drafting_alone(
    cuda: FakeCuda, caplog: pytest.LogCaptureFixture, call: str, failing: str
) -> None:
    """One error in the log, the drafter let go, no buffer lost, and nothing kept of the requests that come."""
    target = Target(cuda)
    target.courier.run()
    target.start([1, 2, 3])
    cuda.failures[call, failing] = CudaError("an illegal memory access was encountered")
    target.launch()
    wait_until(lambda: target.link.closed)
    end_of_threads()
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    for _ in range(4):
        target.finish(target.requests[0])
        target.start([4] * 1000)
        target.launch()
    assert not target.courier._tasks and target.courier._on_device.qsize() <= len(THREADS)  # what ended them
    assert len(target.courier._made) <= NUM_BUFFERS + 1, "a buffer a round"


def test_blocks_arrive_without_holding_up_the_target(cuda: FakeCuda) -> None:
    """The courier reads no tensor of the device, copies from pinned memory alone, and on a stream of its own."""
    target = Target(cuda)
    cuda.pageable_copies.clear()
    target.courier.run()
    target.start([1, 2, 3])
    decode(target, 6)
    target.courier.stop()
    assert not cuda.host_reads and not cuda.pageable_copies
    (own,) = (stream for stream in cuda.streams if stream not in cuda.defaults)
    assert own.queued > 10 and own.priority < 0, "behind full graphs of the default priority blocks come late"


@pytest.mark.parametrize("omitted", [False, True], ids=["as-it-is", "without-the-wait"])
def test_a_block_is_not_cleared_after_it_was_written(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, omitted: bool
) -> None:
    """The cache's memory is cleared on the target's stream, blocks are written on the cache's own."""
    if omitted:
        monkeypatch.setattr(Stream, "wait_stream", lambda stream, other: None)
    cache = SpeculationCache(2, 4, 3, 2, "cuda:0")
    block = SpeculationBlock("0", 1, 10, 0, pack_ids([0, 5]), pack_ids([7, 8, 9]))
    cache.put(Push([block], [], None), [1], [0], [block], [0])
    cache.flush()
    for stream in reversed(cuda.streams):
        stream.synchronize()
    is_there = 10 in cache.blocks.headers.host[1, :, 2]
    assert is_there != omitted, "the stand-in sees no missing wait" if omitted else "a block was lost"


class Signatures:
    """In place of a Triton kernel: the compiled variants that launches would ask for, by Triton's own rules."""

    def __init__(self, kernel: Any) -> None:
        kwargs = {} if isinstance(kernel, JITFunction) else kernel.kwargs  # interpreted, as tests/kernels has it
        self._parameters = kernel.params if not kwargs else JITFunction(kernel.fn, **kwargs).params
        self.seen: set[tuple] = set()

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._launch

    def _launch(self, *args: Any, num_warps: int, **constants: Any) -> None:
        variant: list[Any] = [num_warps, *sorted(constants.items())]
        for parameter, value in zip(self._parameters, args):
            if isinstance(value, torch.Tensor):
                aligned = getattr(value, "host", value).data_ptr() % 16 == 0
                variant.append((value.dtype, parameter.do_not_specialize_on_alignment or aligned))
            elif value is None or isinstance(value, bool):
                variant.append(value)
            else:
                variant.append("int" if parameter.do_not_specialize else (value == 1, value % 16 == 0))
        self.seen.add(tuple(variant))


@pytest.mark.parametrize("on_miss", ["auto", "ngram", "skip"])
def test_nothing_compiles_while_serving(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, on_miss: str) -> None:
    """Every batch size, number of drafts, mix of temperatures, with n-grams and without: all known from the warm-up."""
    kernels = []
    for function in (speculator_module.lookup, speculator_module.write_draft_logits):
        name = f"_{function.__name__}_kernel"
        kernels.append(Signatures(function.__globals__[name]))
        monkeypatch.setitem(function.__globals__, name, kernels[-1])
    num_slots = 33
    with built("cuda:0", num_slots=num_slots, vocab_size=1000, num_speculative_tokens=5, on_miss=on_miss) as speculator:
        speculator._warm_up()
        warm = [set(kernel.seen) for kernel in kernels]
        assert all(warm)
        rng, drawn = random.Random(0), torch.zeros(num_slots + 1, dtype=torch.int32, device="cuda:0")
        temperatures = torch.zeros(num_slots + 1, device="cuda:0")
        for size in range(1, num_slots + 1):
            for wanted in (0, 1, 2, 4, 5):
                speculator._sampled[:] = [rng.random() < 0.5 for _ in range(num_slots)]
                speculator._courier.wants_ngram = on_miss == "ngram" or (on_miss == "auto" and rng.random() < 0.5)
                start = rng.randrange(num_slots + 1 - size)
                rows = batch(torch.arange(num_slots)[start : start + size])
                shift = rng.randint(0, 1)
                speculator.speculate(
                    rows,
                    drawn[shift : shift + size],
                    speculator._req_states.last_sampled_tokens,
                    temperatures[shift : shift + num_slots],
                    wanted,
                )
    assert [kernel.seen for kernel in kernels] == warm


def test_v1_copies_no_dense_proposals(cuda: FakeCuda) -> None:
    """64 rows of five drafts over 152k tokens are 195 MB; what is known of them is some hundred KB."""
    num_drafts, vocab_size = 64, 5000
    rng = np.random.default_rng(0)
    proposals: list[Any] = []
    for i in range(num_drafts):
        ids = np.append(rng.permutation(vocab_size)[:8], [0, 0]).astype(np.int32)
        probs = np.append(rng.random(8) + 0.1, [0, 0]).astype(np.float32)  # cut to fewer ids than there is room for
        proposals.append(None if i % 4 == 0 else (ids, probs))
    q = runner_v1.dense_proposals(list(range(num_drafts)), proposals, vocab_size, torch.device("cuda:0"))
    assert not cuda.host_reads and not cuda.pageable_copies
    expected = torch.zeros(num_drafts, vocab_size)
    for i, proposal in enumerate(proposals):
        ids, probs = ([i], [1.0]) if proposal is None else proposal
        for token_id, prob in zip(ids, probs):
            expected[i, token_id] += float(prob)
    assert torch.equal(q.cpu(), expected)


def test_v1_knows_its_drafts_without_asking_the_device(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading them there would wait for the forward of the target."""
    drafts = [[3, 4], [], [5]]
    proposals = [[(np.int32([draft, 9]), np.float32([0.75, 0.25])) for draft in row] for row in drafts]
    verified: list[Any] = []

    def known(request_ids: list[str], num_tokens: list[int], draft_token_ids: list[list[int]]) -> Any:
        verified.append((request_ids, num_tokens, draft_token_ids))
        return proposals

    batch = SimpleNamespace(
        sampling_metadata=SimpleNamespace(all_greedy=False),
        spec_token_ids=[*drafts, [7]],  # and one that is not in the round
        req_ids=["a", "b", "c"],
        num_tokens_no_spec=np.array([8, 9, 10, 0]),
        vocab_size=12,
    )
    metadata = SimpleNamespace(
        draft_token_ids=torch.tensor([3, 4, 5], dtype=torch.int32, device="cuda:0"), num_draft_tokens=[2, 0, 1]
    )
    cuda.pageable_copies.clear()
    monkeypatch.setattr(runner_v1, "get_tp_group", lambda: SimpleNamespace(rank_in_group=0, world_size=1))
    q = runner_v1._get_spec_decode_draft_probs(
        None, SimpleNamespace(input_batch=batch), SimpleNamespace(proposals=known), metadata
    )
    assert not cuda.host_reads and not cuda.pageable_copies
    assert verified == [(["a", "b", "c"], [8, 9, 10], drafts)]
    assert q.cpu().nonzero().tolist() == [[0, 3], [0, 9], [1, 4], [1, 9], [2, 5], [2, 9]]
