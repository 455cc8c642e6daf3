"""Draw what target and drafter did at the same time, from a trace recorded with VLLM_SSD_TRACE.

    python scripts/record_overlap.py trace.jsonl
    python scripts/plot_overlap.py trace.jsonl --out docs/overlap.svg [--ms 60] [--skip-ms 0]

The window starts `--skip-ms` after the first round that hit and lasts `--ms`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib import rcParams
from matplotlib.figure import Figure

from vllm_ssd.monitor.timeline import Event, read

COLOURS = {"verify": "#3b6fb6", "hand over": "#1d3c66", "step": "#2e9e5b", "outcome": "#12542e", "push": "#d08a1c"}
FATES = {"hit": "#2e9e5b", "miss": "#c0453a", "late": "#8a8f98", "other": "#8e5bb5"}
LABELS = {
    "verify": "verify, + tokens emitted",
    "hand over": "look up, hand over",
    "step": "draft step",
    "outcome": "take the outcome",
    "push": "push",
    "hit": "hit",
    "miss": "miss",
    "late": "late",
    "other": "n-gram drafts",
}
TARGET_Y, DRAFTER_Y, HEIGHT = 1.2, 0.0, 0.7


def main() -> None:
    """Read, cut out a window, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ms", type=float, default=60.0, help="length of the window")
    parser.add_argument("--skip-ms", type=float, default=0.0, help="start so long after the first hit")
    args = parser.parse_args()
    events = read(args.trace)
    first = next((e.at_ns for e in events if e.details.get("fate") == "hit"), None)
    if first is None:
        raise SystemExit(f"{args.trace} has no hit: there is no overlap to draw")
    begin = first + round(1e6 * args.skip_ms)
    figure = draw(window(events, begin, begin + round(1e6 * args.ms)), begin, args.ms)
    figure.savefig(args.out, metadata={"Date": None} if args.out.suffix == ".svg" else {})


def window(events: list[Event], begin_ns: int, end_ns: int) -> list[Event]:
    """The events that lie in a window, those that reach into it included."""
    return [e for e in events if e.at_ns < end_ns and e.at_ns + (e.length_ns or 0) >= begin_ns]


def draw(events: list[Event], begin_ns: int, ms: float) -> Figure:
    """Two lanes: the target above, the drafter below; between them the pushes, and what each outcome found."""
    rcParams["svg.hashsalt"] = "vllm-ssd"
    rcParams["svg.fonttype"] = "none"
    figure = Figure(figsize=(10, 2.6), layout="constrained")
    axis = figure.add_subplot()
    emitted = {e.at_ns: e.details["emitted"] for e in events if e.name == "round"}
    found: dict[str, list[tuple[float, float]]] = {}
    for event in events:
        at, length = (event.at_ns - begin_ns) / 1e6, (event.length_ns or 0) / 1e6
        name = event.details["fate"] if event.name == "round" else event.name
        if event.name == "round" or event.track in ("target", "drafter") and event.name in COLOURS:
            found.setdefault(name, []).append((at, length))
        if event.name == "verify":
            end = event.at_ns + (event.length_ns or 0)
            tokens = next((number for at_ns, number in emitted.items() if at_ns >= end), None)
            if tokens is not None and 0 < at + length / 2 < ms:
                where = (at + length / 2, TARGET_Y + HEIGHT / 2)
                axis.annotate(f"+{tokens}", where, ha="center", va="center", color="white", fontsize=9)
    for name, label in LABELS.items():
        if name not in found:
            continue
        starts = [at for at, _ in found[name]]
        if name in FATES:
            y = [(DRAFTER_Y + HEIGHT + TARGET_Y) / 2] * len(starts)
            axis.plot(starts, y, marker="v", color=FATES[name], markersize=6, linestyle="none", label=label)
        elif name == "push":
            bounds = (DRAFTER_Y + HEIGHT, TARGET_Y)
            axis.vlines(starts, *bounds, color=COLOURS[name], linewidth=1.2, label=label)
        else:
            bar = (TARGET_Y if name in ("verify", "hand over") else DRAFTER_Y, HEIGHT)
            edge = {"edgecolor": "white", "linewidth": 0.6} if name in ("verify", "step") else {}
            axis.broken_barh(found[name], bar, facecolors=COLOURS[name], label=label, **edge)
    ticks = [DRAFTER_Y + HEIGHT / 2, TARGET_Y + HEIGHT / 2]
    axis.set(xlim=(0, ms), ylim=(-0.1, 2.0), xlabel="ms", yticks=ticks, yticklabels=["drafter", "target"])
    axis.tick_params(left=False)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    figure.legend(loc="outside upper center", ncols=9, frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    main()
