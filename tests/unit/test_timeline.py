"""What is recorded with VLLM_SSD_TRACE, and what `vllm-ssd trace` makes of it."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import subprocess
import time
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from script_modules import load_script
from typer.testing import CliRunner

from vllm_ssd.cli import app
from vllm_ssd.drafter import server
from vllm_ssd.drafter.trace import TracedEngine, TracedTransport
from vllm_ssd.link.process import DrafterProcess
from vllm_ssd.link.protocol import Close, Open, Outcome, Push, SpeculationBlock, Step, pack_ids
from vllm_ssd.link.timeline import Timeline, timeline_path
from vllm_ssd.monitor.page import COLOURS, page
from vllm_ssd.monitor.timeline import chrome_trace, read, rounds
from vllm_ssd.target import start
from vllm_ssd.target.trace import TracedDrafterProcess

PROMPT = [11, 12, 13, 14, 15]
SECRETS = {4711, 4712, 4713, 4714}
"""Token ids that occur nowhere else: no timeline may hold them."""


def block(request: str, length: int, outcomes: list[tuple[int, int]], drafts: list[list[int]]) -> SpeculationBlock:
    return SpeculationBlock(request, 1, length, 0, pack_ids([list(o) for o in outcomes]), pack_ids(drafts))


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A trace of one request with a hit, a miss, a late block and n-gram drafts, from both sides."""
    trace, pushes, sent = tmp_path / "trace.jsonl", [], []
    monkeypatch.setattr(DrafterProcess, "__init__", lambda self: None)
    monkeypatch.setattr(DrafterProcess, "send", lambda self, step: sent.append(step))
    monkeypatch.setattr(DrafterProcess, "poll", lambda self, timeout_s=0.0: [pushes.pop(0)] if pushes else [])
    target = Timeline(str(trace), "target")
    link = TracedDrafterProcess(timeline=target)
    link.send(Step([Open("r", 1, pack_ids(PROMPT), 0.0)], 2))
    pushes.append(Push([block("r", 5, [(0, 4711), (0, 4712)], [[4713, 4714], [1, 2]])], [], None))
    assert len(link.poll()) == 1
    link.send(Step([Outcome("r", 1, 6, [4711], [4713, 4714])], 2))  # a hit
    time.sleep(2e-3)
    link.poll()
    link.send(Step([Outcome("r", 1, 8, [4713, 4712], [])], 2))  # one accepted; no block had come
    pushes.append(Push([block("r", 8, [(0, 1)], [[2, 3]])], [], None))
    link.poll(0.01)
    link.send(Step([Outcome("r", 1, 9, [4712], [])], 2))  # not in the block
    link.poll()
    link.send(Step([Outcome("r", 1, 10, [4712], [4713])], 2))  # drafted by n-gram
    link.send(Step([Close("r")], 2))
    assert len(sent) == 6
    target._file.flush()

    drafter = Timeline(str(trace), "drafter")
    steps = iter(range(1, 9))
    engine = SimpleNamespace(num_steps=0, sequences={"r": SimpleNamespace(rows=[1, 2, 3])}, has_work=True)
    engine.advance = lambda *a, **k: None

    def speculate() -> Push:
        engine.num_steps = next(steps)
        return Push([block("r", 10, [(0, 1)], [[2, 3]])], [], None)

    engine.speculate = speculate
    transport = TracedTransport(SimpleNamespace(poll=lambda timeout_s=0.0: [], send=sent.append), drafter)
    traced = TracedEngine(engine, drafter)
    assert traced.has_work
    for _ in range(3):
        transport.poll(1.0)
        traced.advance("r", 1, 10, [4711], [], num_drafts=2)
        transport.send(traced.speculate())
    drafter._file.flush()
    return trace


def test_each_round_has_its_fate(recorded):
    (found,) = rounds(read(recorded)).values()
    assert [(r.fate, r.verified, r.accepted, r.emitted, r.drafts) for r in found] == [
        ("hit", 0, 0, 1, 2),
        ("late", 2, 1, 2, 0),
        ("miss", 0, 0, 1, 0),
        ("other", 0, 0, 1, 1),
    ]
    assert [r.length for r in found] == [6, 8, 9, 10] and [r.grown for r in found] == [2, 0, 1, 0]


def test_tokens_are_not_recorded(recorded):
    for path in recorded.parent.glob("*.timeline"):
        text = path.read_text()
        assert not [token for token in SECRETS if re.search(rf"\b{token}\b", text)], path


def test_both_sides_are_on_one_clock(recorded):
    events = read(recorded)
    assert [e.at_ns for e in events] == sorted(e.at_ns for e in events)
    assert abs(time.monotonic_ns() - events[-1].at_ns) < 60e9
    counted = Counter((e.side, e.name) for e in events)
    assert counted["target", "verify"] == 4 and counted["target", "wait"] == 1
    assert counted["drafter", "step"] == counted["drafter", "push"] == counted["drafter", "wait"] == 3
    verify = next(e for e in events if e.name == "verify" and (e.length_ns or 0) > 1e6)
    assert (verify.length_ns or 0) < 1e9 and verify.details["rows"] == 1


def check_chrome(trace: dict[str, Any]) -> None:
    """What Perfetto's importer of Chrome's JSON needs."""
    assert set(trace) >= {"traceEvents", "displayTimeUnit"}
    named: dict[str, set[tuple[int, ...]]] = {"process_name": set(), "thread_name": set()}
    spans: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in trace["traceEvents"]:
        assert event["ph"] in ("M", "X", "i"), event
        assert isinstance(event["pid"], int) and isinstance(event["tid"], int) and isinstance(event["name"], str)
        if event["ph"] == "M":
            if event["name"] in named:
                key = (event["pid"], event["tid"]) if event["name"] == "thread_name" else (event["pid"],)
                named[event["name"]].add(key)
            continue
        assert event["ts"] >= 0
        assert (event["pid"],) in named["process_name"] and (event["pid"], event["tid"]) in named["thread_name"]
        if event["ph"] == "i":
            assert event["s"] == "t" and "dur" not in event
        else:
            assert event["dur"] >= 0
            spans.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
    for found in spans.values():  # a track is a stack: spans lie beside or inside each other
        found.sort(key=lambda span: (span[0], -span[1]))
        for (_, end), (begin, later) in zip(found, found[1:]):
            assert begin >= end - 1e-3 or later <= end + 1e-3


def test_chrome_s_format(recorded, tmp_path):
    out = tmp_path / "timeline.json"
    done = CliRunner().invoke(app, ["trace", str(recorded), "--out", str(out)])
    assert done.exit_code == 0, done.output
    trace = json.loads(out.read_text())
    check_chrome(trace)
    names = {event["name"] for event in trace["traceEvents"]}
    assert {"verify", "step", "push", "wait", "hit", "miss", "late", "block"} <= names


class Parser(HTMLParser):
    VOID = {"meta"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.counts: Counter[str] = Counter()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.counts[tag] += 1
        self.counts[found.get("class") or ""] += 1
        assert tag not in ("script", "link", "img", "iframe") and not {"src", "href"} & found.keys()
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] += 1
        self.counts[dict(attrs).get("class") or ""] += 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_stands_alone_and_shows_every_round(recorded, tmp_path):
    html = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["trace", str(recorded), "--html", str(html)])
    assert done.exit_code == 0, done.output
    parser, text = Parser(), html.read_text()
    parser.feed(text)
    parser.close()
    assert not parser.open and "http" not in text and "url(" not in text
    assert parser.counts["round"] == 4 and parser.counts["bonus"] == 4
    assert parser.counts["accepted"] == 1 and parser.counts["rejected"] == 1
    assert "1 of 2 drafts were accepted" in text


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")


def browse(html: Path, *arguments: str) -> tuple[str, list[str]]:
    """What a headless Chromium prints of a page, and what the page says on its console."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    command += [f"--user-data-dir={html.parent / 'profile'}", "--enable-logging=stderr", "--window-size=1300,900"]
    done = subprocess.run([*command, *arguments, html.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(not CHROMIUM, reason="no chromium, chromium-browser or google-chrome on the PATH")
def test_a_browser_shows_the_page(recorded, tmp_path):
    from matplotlib.image import imread

    html, shot = tmp_path / "page.html", tmp_path / "page.png"
    text = page(read(recorded), "a trace")
    html.write_text(text)
    assert browse(html, f"--screenshot={shot}")[1] == []
    pixels = {tuple(round(255 * value) for value in pixel[:3]) for pixel in imread(shot).reshape(-1, 4)}
    for name in (("target", "verify"), ("drafter", "step"), ("drafter", "wait"), ("waits", "wait")):
        assert tuple(bytes.fromhex(COLOURS[name][1:])) in pixels, name
    html.write_text(text.replace("</body>", "<script>console.error('planted')</script></body>"))
    shown, console = browse(html, "--dump-dom")
    assert len(console) == 1 and "planted" in console[0]
    assert shown.count('class="round"') == 4 and shown.count('class="bonus"') == 4


def test_a_step_is_wide_enough_to_be_seen(tmp_path):
    """From the first work on: a drafter may have waited for minutes."""
    trace = str(tmp_path / "t")
    drafter = Timeline(trace, "drafter")
    drafter.span("drafter", "wait", 10**9, 100 * 10**9)
    drafter.span("drafter", "step", 100 * 10**9, 100 * 10**9 + 10**6)
    drafter.span("drafter", "push", 100 * 10**9 + 10**6, 100 * 10**9 + 10**6 + 1000)
    drafter.flush()
    spans = re.findall(r'class="span" x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', page(read(Path(trace)), "t"))
    assert [float(x) for x, _ in spans] == [0.0, 10.0]
    assert float(spans[0][1]) >= 8 and float(spans[1][1]) >= 1


def test_the_picture_shows_what_reaches_into_its_window(recorded):
    script = load_script("plot_overlap")
    events = read(recorded)
    step = next(e for e in events if e.name == "verify" and (e.length_ns or 0) > 1e6)
    begin = step.at_ns + 10**6
    shown = script.window(events, begin, begin + 10**7)
    assert step in shown and all(e.at_ns < begin + 10**7 for e in shown)
    assert step not in script.window(events, begin + 10**9, begin + 2 * 10**9)
    labels = script.draw(events, events[0].at_ns, 100.0).legends[0].get_texts()
    assert {"draft step", "push", "hit", "miss", "late", "n-gram drafts"} <= {label.get_text() for label in labels}


def test_a_drafter_that_waits_has_written_what_it_did(tmp_path):
    """The server ends it by SIGKILL."""
    trace = tmp_path / "t"
    timeline = Timeline(str(trace), "drafter")
    timeline.span("drafter", "step", 5, 7)
    found = []
    polled = SimpleNamespace(poll=lambda timeout_s: found.extend(read(trace)))
    TracedTransport(polled, timeline).poll(None)
    assert [event.name for event in found] == ["step"]


def test_a_hostile_request_id_is_text(tmp_path):
    timeline = Timeline(str(tmp_path / "t"), "target")
    name = "<script>alert(1)</script>"
    timeline.instant("rounds", "open", request=name, length=1)
    details = {"verified": 0, "accepted": 0, "emitted": 1, "fate": "late", "drafts": 0, "branches": 0}
    timeline.instant("rounds", "round", request=name, length=2, **details)
    timeline._file.flush()
    assert "<script" not in page(read(tmp_path / "t"), name)


def test_each_drafter_of_a_fleet_has_a_lane_of_its_own(tmp_path):
    timeline = Timeline(str(tmp_path / "t"), "target")
    for track in ("target", "target 1", "waits 1", "drafter"):
        timeline.span(track, "verify", 0, 5)
    timeline._file.flush()
    trace = chrome_trace(read(tmp_path / "t"))
    check_chrome(trace)
    numbers = {event["cat"]: event["tid"] for event in trace["traceEvents"] if event["ph"] == "X"}
    assert len({*numbers.values()}) == 4
    assert page(read(tmp_path / "t"), "fleet").count('fill="#3b6fb6"') == 2, "both are verifications"


def test_a_line_cut_off_by_a_kill_is_left_out_and_others_are_not(tmp_path):
    trace = str(tmp_path / "t[1]")  # no pattern
    path = Path(timeline_path(trace, "target", os.getpid()))
    Timeline(trace, "target").instant("waits", "wait")
    lines = '{"process": "target", "pid": 7}\n{"track": "waits", "name": "wait", "at": 5, "for": 2}\n'
    path.write_text(lines + '{"track": "wai')
    (event,) = read(Path(trace))
    assert (event.pid, event.at_ns, event.length_ns) == (7, 5, 2)
    check_chrome(chrome_trace([event]))
    path.write_text('{"track": "waits"}\n')
    with pytest.raises(ValueError, match="line 1: not a timeline event"):
        read(Path(trace))
    done = CliRunner().invoke(app, ["trace", str(tmp_path / ("absent" * 20)), "--out", str(tmp_path / "x")])
    assert done.exit_code == 1 and "nothing was recorded" in done.output
    assert CliRunner().invoke(app, ["trace", trace]).exit_code == 2


def test_without_a_trace_nothing_of_it_runs():
    """The traced classes stand in only where the variable is set: the others have no word of it."""
    for module in (server, start):
        source = inspect.getsource(module)
        assert source.count("Timeline(") == 1 and "if trace:" in source
    assert "imeline" not in inspect.getsource(DrafterProcess) + inspect.getsource(server.serve)
