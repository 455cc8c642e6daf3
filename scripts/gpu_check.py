"""Check SSD on a machine with a GPU, in eight minutes at most, and compare with the goals of docs/benchmarks.md.

    python scripts/gpu_check.py --out results              # everything
    python scripts/gpu_check.py --out results --parts kernels drafter
    python scripts/gpu_check.py --dry-run                  # the same on the CPU with toy models, to see that it runs

Each part is a process of its own with a time limit, and reports every number when it has it: rows are printed and
appended to OUT/rows.jsonl at once, OUT/gpu_check.json is written anew after each part, and OUT/PART.log holds what a
part printed. So a crash costs one part, and a run that is cut off keeps what it had. The models are made on the spot.
Without vLLM the kernels and the drafter's engine still run. One GPU holds target and drafter; the speed on two is
predicted by the simulator from what was measured, and marked so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from gpu_check_goals import Row, Verdict, predictions, verdicts

from vllm_ssd.planning.engine_host import end_of_log

SCRIPTS = Path(__file__).parent
LIMITS_S = {"kernels": 110, "costs": 120, "drafter": 70, "end_to_end": 120, "benchmarks": 60}
"""Parts in the order in which they run, and how long each may take: eight minutes together."""
POLL_S = 0.2
GRACE_S = 5
"""After SIGTERM a part has this long to end."""


@dataclass
class Part:
    """What became of a part. status: running, done, failed, cut off; error: the end of its log, where it failed."""

    name: str
    limit_s: float
    status: str = "running"
    seconds: float = 0.0
    error: str = ""
    rows: list[Row] = field(default_factory=list)

    def take(self, news: TextIO) -> list[Row]:
        """The rows in the file `news` that are new and whole."""
        start, found = news.tell(), []
        while (line := news.readline()).endswith("\n"):
            found.append(json.loads(line))
            start = news.tell()
        news.seek(start)
        self.rows += found
        return found


class Interrupted(Exception):
    """The whole check was told to stop."""


class Run:
    """A run over several parts: what it prints and what it writes into `out`."""

    def __init__(self, out: Path, dry_run: bool, scale: float) -> None:
        self.parts: list[Part] = []
        self.out, self.dry_run, self._scale = out, dry_run, scale
        self._rows = out / "rows.jsonl"
        self._rows.write_text("")
        self._machine = machine()
        self._began = time.monotonic()

    def run(self, name: str) -> Part:
        """Run one part in a process of its own until it ends or its time is up."""
        part = Part(name, LIMITS_S[name] * self._scale)
        self.parts.append(part)
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="gpu_check-") as folder, self.log(name).open("w") as log:
            rows = Path(folder) / "rows.jsonl"
            rows.write_text("")
            command = [sys.executable, str(SCRIPTS / "gpu_check_parts.py"), name, "--folder", folder]
            process = subprocess.Popen(
                [*command, *(["--dry-run"] if self.dry_run else [])],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                with rows.open() as news:
                    while process.poll() is None and time.monotonic() - began < part.limit_s:
                        self._report(part.name, part.take(news))
                        time.sleep(POLL_S)
                    part.status = "cut off" if process.poll() is None else "failed" if process.returncode else "done"
                    end_group(process)
                    self._report(part.name, part.take(news))
            except BaseException:
                part.status = "cut off"
                end_group(process)
                raise
            finally:
                part.seconds = round(time.monotonic() - began, 1)
        if part.status == "failed":
            part.error = f"exit status {process.returncode}\n{end_of_log(self.log(name))}"
        note = {"failed": f" with {part.error.splitlines()[0]}; see {self.log(name)}" if part.error else ""}
        print(f"{part.name}: {part.status} after {part.seconds:.0f} s{note.get(part.status, '')}", flush=True)
        return part

    def log(self, name: str) -> Path:
        """Where a part's output goes."""
        return self.out / f"{name}.log"

    def write(self) -> list[Verdict]:
        """Write all there is so far into gpu_check.json; the goals, as far as they can be judged by now."""
        rows = [row for part in self.parts for row in part.rows]
        judged = verdicts(rows)
        report = {
            "machine": self._machine,
            "dry_run": self.dry_run,
            "seconds": round(time.monotonic() - self._began, 1),
            "goals": [asdict(verdict) for verdict in judged],
            "predictions": predictions(rows),
            "parts": [asdict(part) for part in self.parts],
        }
        whole = self.out / "gpu_check.json"
        scratch = whole.with_suffix(".tmp")
        scratch.write_text(json.dumps(report, indent=1) + "\n")
        scratch.replace(whole)  # never half of it
        return judged

    def _report(self, name: str, rows: Sequence[Row]) -> None:
        """Print new rows and write them down."""
        with self._rows.open("a") as file:
            for row in rows:
                file.write(json.dumps({"part": name, **row}) + "\n")
                print(f"  {name:<11}{row['what']:<66}{shown(row['value']):>12} {row['unit']}", flush=True)


def shown(value: object) -> str:
    """A number with four significant digits, anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def end_group(process: subprocess.Popen) -> None:
    """End a part and whatever it started; its session is its own."""
    for number, wait_s in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(wait_s)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def machine() -> dict[str, Any]:
    """Hardware, versions, commit and command."""
    versions = {}
    for package in ("vllm", "torch", "triton", "transformers", "vllm-ssd", "flashinfer-python"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "gpus": lines("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"),
        "processor": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": " ".join(lines("git", "-C", str(SCRIPTS), "describe", "--always", "--dirty", "--abbrev=12")),
        "command": " ".join(sys.argv),
    }


def lines(*command: str) -> list[str]:
    """What a command prints; nothing where there is no such command or it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return []


def conclude(run: Run, judged: Sequence[Verdict]) -> int:
    """Print goals, predictions and parts; 0 if every part was done and no goal was missed."""
    print()
    for verdict in judged:
        print(f"{verdict.result:<13}{verdict.goal}: {verdict.measured or 'not measured'}")
    rows = [row for part in run.parts for row in part.rows]
    for predicted in predictions(rows):
        print(f"predicted    {predicted['what']}: {predicted['text']}")
    unfinished = [part for part in run.parts if part.status != "done"]
    missed = [verdict for verdict in judged if verdict.result == "fail"]
    print(f"{len(run.parts)} parts, {len(unfinished)} not done; {len(missed)} goals missed; see {run.out}", flush=True)
    return 1 if unfinished or missed else 0


def main() -> int:
    """Parse, run the parts in order, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the results (default: a new one in the current folder)")
    parser.add_argument("--parts", nargs="+", choices=LIMITS_S, default=list(LIMITS_S))
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on the CPU; no number means anything")
    parser.add_argument("--time", type=float, default=1.0, metavar="FACTOR", help="on all time limits")
    args = parser.parse_args()
    if not args.dry_run and not lines("nvidia-smi", "-L"):
        print("gpu_check: nvidia-smi finds no GPU; --dry-run needs none", file=sys.stderr)
        return 2
    out = args.out or Path(f"gpu_check-{time.strftime('%Y%m%d-%H%M%S')}")
    out.mkdir(parents=True, exist_ok=True)

    def interrupt(number: int, frame: object) -> None:
        raise Interrupted

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, interrupt)
    run = Run(out, args.dry_run, args.time)
    judged = run.write()
    try:
        for name in LIMITS_S:
            if name in args.parts:
                run.run(name)
                judged = run.write()
    except Interrupted:
        judged = run.write()
        print("gpu_check: interrupted")
    return conclude(run, judged)


if __name__ == "__main__":
    sys.exit(main())
