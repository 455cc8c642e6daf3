"""A timeline as a self-contained HTML page, without scripts, fonts or network requests."""

from __future__ import annotations

from html import escape

from vllm_ssd.monitor.timeline import Event, Round, rounds

FATES = {
    "hit": ("#2e9e5b", "hit: a branch was there"),
    "other": ("#d08a1c", "n-gram or just in time"),
    "miss": ("#c0453a", "miss: no branch for it"),
    "late": ("#8a8f98", "late: no block had arrived"),
}
STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; margin: 2rem; color: #222; background: #fff; }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; } th { text-align: left; font-weight: 600; }
th, td { padding: .1rem .7rem .1rem 0; font-variant-numeric: tabular-nums; } td.n { text-align: right; }
svg { display: block; } .lanes { display: flex; } .lanes > div { overflow-x: auto; } .lanes > svg { flex: none; }
summary { cursor: pointer; font-weight: 600; } .key span { margin-right: 1.2rem; }
.key i { display: inline-block; width: .8em; height: .8em; margin-right: .4em; }
@media (prefers-color-scheme: dark) { body { color: #ddd; background: #16181c; } }
"""
BOX = 14
LANE_PX, LABEL_PX = 26, 110
PX_PER_MS = 10.0
"""Wide enough for steps of a millisecond to be visible; the lanes scroll."""
TICK_MS, LABELLED_TICKS = 10, 5
MAX_SPANS, MAX_PX = 4000, 100_000
"""Limits on the spans and the width of the lanes; longer traces are cut off."""
COLOURS = {
    ("target", "verify"): "#3b6fb6",
    ("target", "hand over"): "#9fbce0",
    ("drafter", "step"): "#2e9e5b",
    ("drafter", "outcome"): "#8fd0a8",
    ("drafter", "push"): "#d08a1c",
    ("drafter", "wait"): "#e4e6ea",
    ("waits", "wait"): "#c0453a",
}


def page(events: list[Event], title: str) -> str:
    """Render a trace as HTML: both sides over time, then each request round by round."""
    found = rounds(events)
    parts = [
        "<!DOCTYPE html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
        f"<style>{STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        _summary(found),
        _key([(colour, text) for colour, text in FATES.values()]),
        "<h2>Both sides over time</h2>",
        _key([(colour, f"{track}: {name}") for (track, name), colour in COLOURS.items()]),
        _lanes(events),
        "<h2>Requests</h2>",
    ]
    for number, (request, list_) in enumerate(found.items()):
        parts.append(_request(request, list_, is_open=number == 0))
    return "\n".join([*parts, "</body></html>", ""])


def _key(entries: list[tuple[str, str]]) -> str:
    spans = "".join(f'<span><i style="background:{colour}"></i>{escape(text)}</span>' for colour, text in entries)
    return f'<p class="key">{spans}</p>'


def _summary(found: dict[str, list[Round]]) -> str:
    everything = [r for list_ in found.values() for r in list_ if r.emitted]
    total = len(everything)
    verified, accepted = sum(r.verified for r in everything), sum(r.accepted for r in everything)
    shares = ", ".join(f"{sum(r.fate == fate for r in everything)} {fate}" for fate in FATES)
    return f"<p>{len(found)} requests, {total} outcomes: {shares}. {accepted} of {verified} drafts were accepted.</p>"


def _lanes(events: list[Event]) -> str:
    """A scrolling SVG with a lane for each process and track that has spans, starting at the first work."""
    spans = [event for event in events if event.length_ns is not None]
    first = next((event.at_ns for event in events if event.name != "wait"), None)
    if not spans or first is None:
        return "<p>No spans.</p>"
    last = first + round(1e6 * MAX_PX / PX_PER_MS)
    spans = [event for event in spans if first <= event.at_ns < last][:MAX_SPANS]
    total = max((event.at_ns + (event.length_ns or 0) - first for event in spans), default=0) / 1e6
    lanes = sorted({(event.side != "target", event.pid, event.track) for event in spans})
    height = LANE_PX * (len(lanes) + 1)
    labels = [
        f'<text x="0" y="{row * LANE_PX + 17}" font-size="12" fill="currentColor">{escape(track)} {pid}</text>'
        for row, (_, pid, track) in enumerate(lanes)
    ]
    width = max(PX_PER_MS * total, 1.0)
    parts = [
        '<div class="lanes">',
        f'<svg width="{LABEL_PX}" height="{height}">{"".join(labels)}</svg>',
        f'<div><svg width="{width:.0f}" height="{height}" role="img" aria-label="timeline">',
    ]
    for number in range(int(total / TICK_MS) + 1):
        x, y = number * TICK_MS * PX_PER_MS, LANE_PX * len(lanes)
        parts.append(f'<line x1="{x:.0f}" y1="0" x2="{x:.0f}" y2="{y + 4}" stroke="#8a8f98" stroke-width="0.5"/>')
        if number % LABELLED_TICKS == 0:
            parts.append(
                f'<text x="{x + 3:.0f}" y="{y + 16}" font-size="11" fill="currentColor">{number * TICK_MS} ms</text>'
            )
    for event in spans:
        colour = COLOURS.get((event.track.partition(" ")[0], event.name), "#999")
        row = lanes.index((event.side != "target", event.pid, event.track))
        length = (event.length_ns or 0) / 1e6
        text = f"{event.name}, {length:.2f} ms" + "".join(f", {k} {v}" for k, v in event.details.items())
        parts.append(
            f'<rect class="span" x="{(event.at_ns - first) / 1e6 * PX_PER_MS:.2f}" y="{row * LANE_PX + 3}" '
            f'width="{max(PX_PER_MS * length - 0.5, 1.0):.2f}" height="{LANE_PX - 8}" '
            f'fill="{colour}"><title>{escape(text)}</title></rect>'
        )
    return "\n".join([*parts, "</svg></div></div>"]) + f"<p>{total:.1f} ms from left to right; it scrolls.</p>"


def _request(request: str, list_: list[Round], is_open: bool) -> str:
    """A request's rounds: a box per verified draft, the token after them, and the outcome."""
    rows = []
    for number, r in enumerate(list_, start=1):
        colour, text = FATES[r.fate]
        ms = (r.at_ns - list_[0].at_ns) / 1e6
        used = 1 if r.fate == "hit" else 0
        rows.append(
            f'<tr class="round"><td class="n">{number}</td><td class="n">{ms:.1f}</td><td class="n">{r.length}</td>'
            f'<td>{_boxes(r)}</td><td style="color:{colour}" title="{escape(text)}">{r.fate}</td>'
            f'<td class="n">{r.grown}</td><td class="n">{used}</td><td class="n">{r.drafts}</td></tr>'
        )
    head = "".join(
        f"<th>{name}</th>"
        for name in ("round", "ms", "tokens", "drafts verified", "outcome", "branches grown", "used", "next drafts")
    )
    accepted, verified = sum(r.accepted for r in list_), sum(r.verified for r in list_)
    return (
        f"<details{' open' * is_open}><summary>{escape(request)}: {len(list_)} rounds, {accepted} of {verified} drafts "
        f"accepted</summary><table><tr>{head}</tr>{''.join(rows)}</table></details>"
    )


def _boxes(r: Round) -> str:
    """Accepted drafts filled, rejected ones hollow, and the target's own token as a dot."""
    parts = [f'<svg width="{BOX * (r.verified + 1) + 2}" height="{BOX}">']
    for i in range(r.verified):
        fill = "#2e9e5b" if i < r.accepted else "none"
        stroke = "#2e9e5b" if i < r.accepted else "#c0453a"
        kind = "accepted" if i < r.accepted else "rejected"
        parts.append(
            f'<rect class="{kind}" x="{i * BOX + 1}" y="2" width="{BOX - 4}" height="{BOX - 4}" fill="{fill}" '
            f'stroke="{stroke}"/>'
        )
    if r.emitted:
        parts.append(f'<circle class="bonus" cx="{r.verified * BOX + BOX / 2}" cy="{BOX / 2}" r="4" fill="#3b6fb6"/>')
    return "".join([*parts, "</svg>"])
