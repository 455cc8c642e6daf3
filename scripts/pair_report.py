"""What the bundled pair's README says of it: how well the drafter predicts its target on held-out text."""

import argparse
import math
import platform

import torch
import torch.nn.functional as F
from pair_model import Llama, continue_text
from torch import Tensor

WINDOW = 512
PROMPT = 64


@torch.no_grad()
def teacher_forced(target: Llama, drafter: Llama, tokens: Tensor, rows: int | None = None) -> dict[str, float]:
    """Return the target's loss and the greedy agreement over all windows of a text, or so many spread ones."""
    loss, agreed, count = 0.0, 0, 0
    windows = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)
    chosen = torch.linspace(0, len(windows) - 1, rows or len(windows)).long()
    for some in windows[chosen].split(8):
        logits = target(some)
        loss += F.cross_entropy(logits[:, :-1].flatten(0, 1), some[:, 1:].flatten(), reduction="sum").item()
        agreed += (logits.argmax(-1) == drafter(some).argmax(-1))[:, :-1].sum().item()
        count += some[:, 1:].numel()
    return {"loss": loss / count, "agreement": agreed / count}


@torch.no_grad()
def on_own_continuations(
    target: Llama, drafter: Llama, tokens: Tensor, new: int = 128, drafted: int = 4
) -> dict[str, float]:
    """Return agreement, and accepted drafts per round, on greedy continuations of 64 prompts."""
    starts = torch.linspace(0, len(tokens) - PROMPT, 64).long().tolist()
    rows = continue_text(target, torch.stack([tokens[s : s + PROMPT] for s in starts]), PROMPT + new)
    agrees = (drafter(rows).argmax(-1)[:, PROMPT - 1 : -1] == rows[:, PROMPT:]).tolist()
    rounds = accepted = 0
    for row in agrees:
        at = 0
        while at + drafted < new:
            run = next((i for i in range(drafted) if not row[at + i]), drafted)
            rounds, accepted, at = rounds + 1, accepted + run, at + run + 1
    return {"agreement": sum(map(sum, agrees)) / (64 * new), "accepted": accepted / rounds}


def write_readme(args: argparse.Namespace, corpus: Tensor, text: dict, own: dict) -> None:
    """Write down what the pair is, how it was made and what was measured."""
    size = sum(f.stat().st_size for name in ("target", "drafter") for f in (args.out / name).iterdir()) / 1e6
    (args.out / "README.md").write_text(
        README.format(
            size=size,
            history=(args.out / "history.txt").read_text().rstrip(),
            batch=args.batch,
            python=platform.python_version(),
            tokens=len(corpus) / 1e6,
            loss=text["loss"],
            perplexity=math.exp(text["loss"]),
            text=text["agreement"],
            own=own["agreement"],
            accepted=own["accepted"],
            emitted=own["accepted"] + 1,
        )
    )


README = """\
# The bundled pair

A tiny target (`target/`: 5 layers, 4.46 M parameters) and a drafter distilled from it (`drafter/`: 2 layers,
1.31 M), with one byte-level BPE tokenizer of 2048 tokens. Both are ordinary Llama checkpoints in bfloat16,
{size:.1f} MB together; the wheel does not contain them. With them, tests, demo and benchmarks run anywhere with a
drafter that does predict its target. Neither model writes useful code.

The training text is CPython {python}'s standard library ({tokens:.1f} M tokens, without its tests, codec
tables and help topics), which is under the Python Software Foundation License.

## Retrain

    python scripts/train_pair.py --minutes 30

trains on two CPU cores and writes `tests/assets/pair`, including this file. The learning rates follow the
clock, so the result depends on the machine's speed; with `--co-training-steps` and
`--distillation-steps` they follow step counts instead. This pair came from:

{history}

## Measured

On files held out of training, on the saved weights in float32:

| what | value |
|---|---|
| target, loss per token (perplexity) | {loss:.3f} ({perplexity:.2f}) |
| greedy agreement, held-out text | {text:.3f} |
| greedy agreement, target's greedy continuations (64 prompts of 64 tokens, 128 new each) | {own:.3f} |
| drafts accepted per round at K = 4, same continuations | {accepted:.2f} |
| tokens per round at K = 4 | {emitted:.2f} |
"""
