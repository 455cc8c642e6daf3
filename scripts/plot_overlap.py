"""Draw what target and drafter did at the same time, from a trace recorded with VLLM_SSD_TRACE.

    python scripts/plot_overlap.py trace.jsonl --out docs/overlap.svg [--ms 40] [--skip-ms 0]

The window starts `--skip-ms` after the first round that hit and lasts `--ms`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib import rcParams
from matplotlib.figure import Figure

from vllm_ssd.monitor.timeline import Event, read

COLOURS = {"verify": "#3b6fb6", "hand over": "#1d3c66", "step": "#2e9e5b", "outcome": "#12542e", "push": "#d08a1c"}
FATES = {"hit": "#2e9e5b", "miss": "#c0453a", "late": "#8a8f98", "other": "#d08a1c"}
LABELS = {"verify": "verify", "hand over": "look up, hand over", "step": "draft step", "push": "push"}


def main() -> None:
    """Read, cut out a window, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ms", type=float, default=40.0, help="length of the window")
    parser.add_argument("--skip-ms", type=float, default=0.0, help="start so long after the first hit")
    args = parser.parse_args()
    events = read(args.trace)
    first = next((e.at_ns for e in events if e.details.get("fate") == "hit"), None)
    if first is None:
        raise SystemExit(f"{args.trace} has no hit: there is no overlap to draw")
    begin = first + round(1e6 * args.skip_ms)
    draw([e for e in events if begin <= e.at_ns < begin + 1e6 * args.ms], begin, args.ms).savefig(
        args.out, metadata={"Date": None} if args.out.suffix == ".svg" else {}
    )


def draw(events: list[Event], begin_ns: int, ms: float) -> Figure:
    """Two lanes: the target above, the drafter below; between them what each outcome found."""
    rcParams["svg.hashsalt"] = "vllm-ssd"
    figure = Figure(figsize=(10, 2.4), layout="constrained")
    axis = figure.add_subplot()
    drawn: set[str] = set()
    for event in events:
        at = (event.at_ns - begin_ns) / 1e6
        if event.length_ns is not None and event.name in COLOURS and event.track in ("target", "drafter"):
            label = LABELS.get(event.name) if event.name not in drawn else None
            drawn.add(event.name)
            y, length = (1.1 if event.side == "target" else 0.0), event.length_ns / 1e6
            axis.broken_barh([(at, max(length, 0.02))], (y, 0.7), facecolors=COLOURS[event.name], label=label)
        elif event.name == "round":
            fate = event.details["fate"]
            label = f"outcome: {fate}" if fate not in drawn else None
            drawn.add(fate)
            axis.plot([at], [0.9], marker="v", color=FATES[fate], markersize=5, linestyle="none", label=label)
    axis.set(xlim=(0, ms), ylim=(-0.1, 1.9), xlabel="ms", yticks=[0.35, 1.45], yticklabels=["drafter", "target"])
    axis.tick_params(left=False)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    figure.legend(loc="outside upper center", ncols=8, frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    main()
