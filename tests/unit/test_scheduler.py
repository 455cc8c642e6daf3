"""The adaptive scheduler of vLLM's V2 runner: what it reports to an `Adaptation` and reads from it."""

from __future__ import annotations

import inspect
import random
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_ssd.compat.target import runner

pytest.importorskip("vllm.v1.spec_decode.dynamic.utils", reason="0.30: ssd uses the V1 runner")

from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.core import EngineCore
from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup
from vllm.v1.worker.gpu import cudagraph_utils

from vllm_ssd.compat.target import scheduler as seam

K, BATCH = 5, 4
LAG = 2
"""Rounds between a choice and the one that carries it out."""


def test_vllm_uses_what_is_patched_as_expected() -> None:
    parameters = ["self", "scheduler_output", "model_runner_output"]
    assert list(inspect.signature(Scheduler.update_from_output).parameters) == parameters
    assert inspect.getsource(Scheduler).count("dynamic_sd_lookup") == 5, "vLLM reads the table elsewhere as well"
    read = "num_spec_tokens_to_schedule = self.dynamic_sd_lookup[\n                len(num_scheduled_tokens)\n"
    assert read in inspect.getsource(Scheduler.schedule)
    assert "] * scheduler_output.num_spec_tokens_to_schedule" in inspect.getsource(AsyncScheduler)
    made = inspect.getsource(EngineCore.__init__)
    assert "Scheduler = vllm_config.scheduler_config.get_scheduler_cls()" in made and "= Scheduler(\n" in made
    source = inspect.getsource(EngineArgs.create_engine_config)
    assert source.index("self.create_speculative_config(") < source.index("scheduler_cls=self.scheduler_cls")


def test_vllm_captures_graphs_for_every_number_in_the_table() -> None:
    def table(max_num_seqs: int) -> list[int]:
        ranges = runner.drafts_by_batch_size(K, max_num_seqs)
        return build_dynamic_sd_schedule_lookup(ranges, max_num_seqs, K)

    assert table(8) == [0, 0, 1, 2, 4, 5, 5, 5, 5]
    assert table(3) == [0, 0, 1, 5] and table(2) == [0, 0, 5]
    assert "for num_spec in dense_schedule[1:]" in inspect.getsource(cudagraph_utils.CudaGraphManager._init_candidates)


class Clock:
    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Our scheduler on top of a stubbed vLLM scheduler, and the clock it reads."""

    def init(self: Any, *, vllm_config: Any) -> None:
        self.num_spec_tokens = K
        self.dynamic_sd_lookup = [0, 0, 1, 2, 4, 5]
        self.parallel_config = SimpleNamespace(pipeline_parallel_size=vllm_config.stages)

    def start(stages: int = 1) -> seam.Adaptive:
        scheduler_config = SimpleNamespace(async_scheduling=True)
        return seam.scheduler(SimpleNamespace(scheduler_config=scheduler_config, stages=stages))

    monkeypatch.setattr(Scheduler, "__init__", init)
    monkeypatch.setattr(AsyncScheduler, "__init__", lambda self, **arguments: Scheduler.__init__(self, **arguments))
    monkeypatch.setattr(Scheduler, "update_from_output", lambda self, *args: args)
    monkeypatch.setattr(seam, "time", clock := Clock())
    return SimpleNamespace(start=start, clock=clock)


def outputs(
    request_ids: list[str],
    offered: list[int],
    accepted: list[int],
    extra: int = 0,
    state: runner.DrafterState = runner.DrafterState.IN_TIME,
) -> tuple[Any, Any]:
    """Scheduler and model runner output of one round; extra: prompt tokens scheduled for each row."""
    scheduled = SimpleNamespace(
        num_scheduled_tokens={request_id: 1 + m + extra for request_id, m in zip(request_ids, offered)},
        scheduled_spec_decode_tokens={request_id: [-1] * m for request_id, m in zip(request_ids, offered) if m},
    )
    rows = list(reversed(request_ids))  # the runner may reorder rows
    sampled = dict(zip(request_ids, ([7] * (k + 1) for k in accepted)))
    result = SimpleNamespace(
        sampled_token_ids=[sampled[request_id] for request_id in rows],
        req_id_to_index={request_id: i for i, request_id in enumerate(rows)},
    )
    setattr(result, runner.DRAFTER_STATE, int(state))
    return scheduled, result


@pytest.mark.parametrize(("token_s", "best"), [(0.0, {4, 5}), (0.4, {2, 4}), (5.0, {0})])
def test_rounds_converge_to_the_best_number_of_drafts(engine: SimpleNamespace, token_s: float, best: set[int]) -> None:
    scheduler, rng = engine.start(), random.Random(0)
    names = [f"r{i}" for i in range(BATCH)]
    wanted = [K] * LAG
    for _ in range(1500):
        wanted.append(scheduler.dynamic_sd_lookup[BATCH])
        k = wanted[-1 - LAG]
        engine.clock.now += 10 + token_s * BATCH * (1 + k)
        accepted = [next((i for i in range(k) if rng.random() > 0.6), k) for _ in names]
        result = scheduler.update_from_output(*outputs(names, [k] * BATCH, accepted))
        assert result[0].num_scheduled_tokens.keys() == set(names), "vLLM's own method was not called"
    assert set(wanted) <= {0, 1, 2, 4, 5}
    assert sum(k in best for k in wanted[500:]) > 0.9 * len(wanted[500:])


def test_only_rounds_of_pure_decoding_are_learned_from(
    engine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = engine.start()
    learned = []
    monkeypatch.setattr(scheduler._adaptation, "observe", lambda *round: learned.append(round))

    def update(request_ids: list[str], offered: list[int], accepted: list[int], extra: int = 0) -> None:
        engine.clock.now += 1.0
        scheduler.update_from_output(*outputs(request_ids, offered, accepted, extra))

    update(["a", "b"], [K, K], [1, 2])
    assert not learned, "the duration of the first round is unknown"
    update(["a", "b"], [K, 2], [0, 2])
    assert learned.pop() == (2, K, [K, 2], [0, 2], 1.0, True)
    update(["a", "b", "c"], [K, K, 0], [1, 1, 0])
    update(["a", "b", "c"], [0, 0, 0], [0, 0, -1])
    update(["a", "b", "c"], [0, 0, 0], [0, 0, 0], extra=1)
    update([], [], [])
    update([], [], [])
    assert not learned, "a prompt, or a batch that has changed"


def test_batches_in_flight_are_timed_separately(engine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = engine.start(stages=2)
    learned = []
    monkeypatch.setattr(scheduler._adaptation, "observe", lambda *round: learned.append(round[4]))
    for i in range(6):
        engine.clock.now += 1.0
        scheduler.update_from_output(*outputs([["a", "b"], ["c"]][i % 2], [K] * (2 - i % 2), [0] * (2 - i % 2)))
    assert learned == [2.0] * 4


def test_a_drafter_that_is_behind_or_away_teaches_nothing(
    engine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it is away rounds carry no drafts; once it is back, as many as before, with nothing to learn again."""
    scheduler = engine.start()
    learned = []
    observe = scheduler._adaptation.observe
    monkeypatch.setattr(scheduler._adaptation, "observe", lambda *round: (learned.append(round[-1]), observe(*round)))

    def update(state: runner.DrafterState, drafts: int) -> int:
        engine.clock.now += 1.0
        scheduler.update_from_output(*outputs(["a", "b"], [drafts] * 2, [0, 0], state=state))
        return scheduler.dynamic_sd_lookup[2]

    update(runner.DrafterState.IN_TIME, K)
    assert [update(runner.DrafterState.BEHIND, K) for _ in range(100)] == [K] * 100 and learned == [False] * 100
    learned.clear()
    assert [update(runner.DrafterState.AWAY, 0) for _ in range(500)] == [0] * 500 and not learned
    assert update(runner.DrafterState.BEHIND, 0) == K
    assert update(runner.DrafterState.IN_TIME, K) == K and learned == [False, True]
