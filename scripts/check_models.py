"""Check tiny random models of all architectures, as targets and as drafters, and write the table of docs/models.md.

    python scripts/check_models.py --out models.json --only gemma3 gpt_oss --redo
    python scripts/check_models.py --out models.json --seconds 220
    python scripts/check_models.py --out models.json --table docs/models.md

The last writes the rows of the models that `--out` has; other rows of the page stay as they are.

Every model of `tests/model_zoo.py` is its own drafter; one that cannot draft gets a Llama as drafter. Greedy float32
text is compared with that of the target alone, by `tests/model_check.py`, in a process for each. Results are kept in
`--out`, and what is there is not run again, so that the whole can be done in pieces. Exits with 1 when a model that was
run has another text as the target, or fails, or does not agree with itself as its own drafter.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import select
import signal
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from generated_page import fill

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
REFUSED = "ssd fails: ValueError: ssd: "
"""Of a target that `ssd` refuses, as vLLM's own speculation changes its text, too."""
LIMIT_S = 600
"""No check takes so long."""
BEGIN, END = "<!-- table of scripts/check_models.py: begin -->", "<!-- end -->"


class Child:
    """`model_check.check(name)` in a fork of this process, which has imported vLLM; its output goes to `log`."""

    def __init__(self, name: str, log: Path, with_trees: bool) -> None:
        self.name, self.began = name, time.monotonic()
        read, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            self._check(name, log, write, with_trees)
        os.close(write)
        self.pipe = os.fdopen(read)

    @staticmethod
    def _check(name: str, log: Path, write: int, with_trees: bool) -> None:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        import model_check

        signal.alarm(LIMIT_S)
        with os.fdopen(write, "w") as pipe:
            json.dump(model_check.check(name, with_trees=with_trees), pipe)
        os._exit(0)

    def result(self) -> dict[str, Any]:
        """What it found; waits for its end."""
        text = self.pipe.read()
        self.pipe.close()
        _, status = os.waitpid(self.pid, 0)
        if text:
            return json.loads(text)
        ended = f"its process ended with {os.waitstatus_to_exitcode(status)}"
        return {"target": ended, "attention": "–", "drafter": "not run", "trees": "not run"}


def check_all(
    names: list[str], with_trees: Collection[str], folder: Path, num_jobs: int, seconds: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The results of `names`, `num_jobs` at a time, as they come; none is started after `seconds`.

    with_trees: those that are also run with the drafter's own attention
    """
    import fork_server

    fork_server.preload()  # once for all

    started, waiting, running = time.monotonic(), list(names), []
    while running or waiting:
        while waiting and len(running) < num_jobs and time.monotonic() - started < seconds:
            name = waiting.pop(0)
            running.append(Child(name, folder / f"{name}.log", name in with_trees))
        if not running:
            return
        ready, _, _ = select.select([child.pipe for child in running], [], [])
        for child in [child for child in running if child.pipe in ready]:
            running.remove(child)
            yield child.name, child.result() | {"seconds": round(time.monotonic() - child.began)}


def row(name: str, result: dict[str, Any]) -> list[str]:
    """The cells of a model's line in the table."""
    target = "same text" if result["target"] == "ok" else result["target"]
    if target.startswith(REFUSED):
        target = f"refused: vLLM's speculation changes its text{' on the CPU' if 'on the CPU' in target else ''}"
    elif "vLLM alone fails" in target:
        target = f"not on this CPU ({target.partition(': ')[2]})"
    if result.get("stock"):
        target += f"; {result['stock']}"
    drafter, trees = result["drafter"], result["trees"]
    if drafter == "ok":
        drafter = f"yes ({result['accepted']} of its own {result['drafted']} drafts accepted)"
    if "cannot draft" in drafter:
        drafter = trees = "no, a prefix LM" if "prefix LM" in drafter else "no, has a state"
    refusal = re.search(r"tree attention does not support ([\w ]+)", trees)
    trees = "yes" if trees == "ok" else f"no: {refusal[1]}" if refusal else trees
    cells = (name, result.get("architecture", "–"), result["attention"], target, drafter, trees)
    return [cell.replace("|", "/") for cell in cells]


def rows(page: str) -> dict[str, list[str]]:
    """The cells of each line of the page's table, by the model's name."""
    lines = [line for line in page.partition(BEGIN)[2].partition(END)[0].splitlines() if line.startswith("| ")]
    cells = [line.strip("| ").split(" | ") for line in lines[1:]]
    return {name: [name, *others] for name, *others in cells}


def with_results(page: str, results: dict[str, dict[str, Any]]) -> str:
    """The page with new lines for the models of `results`, in the zoo's order, and what the zoo leaves out."""
    from model_zoo import LEFT_OUT, ZOO

    found = rows(page) | {name: row(name, result) for name, result in results.items()}
    known = [found[name] for name in ZOO if name in found]
    content = [
        "| model | architecture | attention | as the target | as the drafter | with tree attention |",
        "|---|---|---|---|---|---|",
        *(f"| {' | '.join(cells)} |" for cells in known),
    ]
    targets, drafters = (sum(cells[i].startswith(good) for cells in known) for i, good in ((3, "same"), (4, "yes")))
    content += ["", f"Of {len(ZOO)} models {targets} have their own text with drafts, and {drafters} draft."]
    if missing := [name for name in ZOO if name not in found]:
        content += ["", f"Not run: {', '.join(missing)}."]
    content += ["", "Other text decoders of vLLM's registry are left out:", ""]
    content += [f"- {reason}: {', '.join(architectures)}" for reason, architectures in LEFT_OUT.items()]
    return fill(page, BEGIN, END, "\n".join(content))


def is_sound(result: dict[str, Any]) -> bool:
    """Whether nothing is wrong: what cannot draft is refused, and what our attention does not know has vLLM's."""
    if "cannot draft" in result["drafter"]:
        lossy = result["target"].startswith(REFUSED) and "another text" in result["stock"]
        return result["target"] == "ok" or lossy
    return result["target"] == result["drafter"] == "ok"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON of the results, read and extended")
    parser.add_argument("--only", nargs="*", help="names in tests/model_zoo.py; all without it")
    parser.add_argument("--trees", nargs="*", help="those to run with the drafter's own attention, too; all without it")
    parser.add_argument("--redo", action="store_true", help="run again what --out has already")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no check after so long")
    parser.add_argument("--jobs", type=int, default=1, help="checks at a time")
    parser.add_argument("--table", type=Path, help="write the table into this page, and run nothing")
    parser.add_argument("--logs", type=Path, help="folder for what the engines print")
    arguments = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    from model_zoo import ZOO

    results = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    names = arguments.only or list(ZOO)
    if arguments.table:
        arguments.table.write_text(with_results(arguments.table.read_text(), results))
        return 0
    faults = []
    wanted = [name for name in names if arguments.redo or name not in results]
    with_trees, logs = names if arguments.trees is None else arguments.trees, arguments.logs or arguments.out.parent
    for name, result in check_all(wanted, with_trees, logs, arguments.jobs, arguments.seconds):
        results[name] = result
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{name}: {result}", flush=True)
        faults += [] if is_sound(result) else [name]
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
