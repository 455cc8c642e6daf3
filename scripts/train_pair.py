"""Train the bundled target and drafter on the Python standard library's own sources.

The two models are co-trained: every step the target learns the text and the drafter learns the
target's distribution from the same forward pass. A last phase freezes the target and distils the
drafter further, half on corpus text and half on the target's own continuations.

    python scripts/train_pair.py --minutes 30

`--parallel` fine-tunes that drafter into one that drafts in parallel, with masks in the places of drafts (PARD), and
keeps it beside the pair. Repeated, it goes on with what it has written.
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from pair_corpus import Windows, encode, read_sources, train_tokenizer
from pair_model import DRAFTER, TARGET, Llama, continue_text, load_pair, load_saved, save_model, save_pair
from pair_parallel import MASKS, Layout, accepted_by_drafts, mask_token, parallel_loss
from pair_report import PROMPT, WINDOW, on_own_continuations, teacher_forced, write_readme
from tokenizers import Tokenizer
from torch import Tensor

CO_TRAINING_SHARE = 0.7  # of the time budget; the rest distils the drafter alone
WARM_UP_SHARE = 0.02  # of co-training
HOLD_UNTIL = 0.35  # of co-training
DISTILLATION_RATE = 0.35  # share of the peak learning rates at which distillation starts
SHORT_WINDOW = 256  # attention over short windows is cheaper: co-training begins on them
SHORT_WINDOWS_UNTIL = 0.65  # of co-training
CONTINUATION = SHORT_WINDOW  # tokens of one self-generated row, prompt included
GROUPS = 20  # of masks in one row
PARALLEL_RATE = 0.7  # share of the peak learning rates at which fine-tuning with masks starts
REPORTED_DRAFTS = (2, 4, 5, 8, 10)


def co_training_loss(target: Llama, drafter: Llama, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the target's loss on the text and the drafter's loss on the target's distribution."""
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = target(tokens), drafter(tokens)
    theirs, ours = theirs.float(), ours.float()
    text = F.cross_entropy(theirs[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    return text, -(theirs.detach().softmax(-1) * ours.log_softmax(-1)).sum(-1).mean()


def distillation_loss(target: Llama, drafter: Llama, tokens: Tensor) -> Tensor:
    """Return the drafter's loss on the frozen target's distribution and on its first choice."""
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            theirs = target(tokens)
        ours = drafter(tokens)
    theirs, ours = theirs.float(), ours.float().log_softmax(-1)
    soft = -(theirs.softmax(-1) * ours).sum(-1).mean()
    return soft + 0.5 * F.nll_loss(ours.flatten(0, 1), theirs.argmax(-1).flatten())


def optimizers(model: Llama) -> list[torch.optim.Optimizer]:
    """Return Muon for the hidden matrices and AdamW for everything else."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    norms = [p for p in model.parameters() if p.ndim == 1]
    rest = [
        {"params": [model.model.embed_tokens.weight], "lr": 4e-3},
        {"params": norms, "lr": 2e-3},
    ]
    made = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.05),
        torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    for group in (g for optimizer in made for g in optimizer.param_groups):
        group["peak_lr"] = group["lr"]
    return made


def update(made: list[torch.optim.Optimizer], rate: float) -> None:
    """Take one step at the given share of the peak learning rates and clear the gradients."""
    for optimizer in made:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * rate
        optimizer.step()
    clear(made)


def clear(made: list[torch.optim.Optimizer]) -> None:
    """Drop all gradients."""
    for optimizer in made:
        optimizer.zero_grad(set_to_none=True)


def decayed(progress: float) -> float:
    """Return a learning-rate share: warm up, hold, then fall linearly to zero at progress one."""
    return min(1.0, progress / WARM_UP_SHARE + 0.02, (1 - progress) / (1 - HOLD_UNTIL))


class Clock:
    """Progress through a phase's budget, by step count where one is given and else by the clock."""

    def __init__(self, minutes: float, steps: int | None):
        self.begin, self.seconds, self.steps, self.step = time.monotonic(), minutes * 60, steps, 0

    def elapsed(self) -> float:
        """Return the seconds since the phase began."""
        return time.monotonic() - self.begin

    def progress(self) -> float:
        """Return the share of the budget that is spent."""
        return self.step / self.steps if self.steps else self.elapsed() / self.seconds


def co_train(
    args: argparse.Namespace, tokenizer: Tokenizer, corpus: Tensor, held_out: Tensor
) -> tuple[Llama, Llama, Clock]:
    """Train the target on the text and the drafter on the target, writing the pair out as it improves."""
    target, drafter = Llama(TARGET), Llama(DRAFTER)
    drafter.model.embed_tokens.load_state_dict(target.model.embed_tokens.state_dict())
    losses = torch.compile(co_training_loss, dynamic=False, disable=not args.compile)
    long, short = Windows(corpus, WINDOW, args.seed), Windows(corpus, SHORT_WINDOW, args.seed + 1)
    for tokens in (long.batch(args.batch), short.batch(2 * args.batch)):  # compile off the clock
        text_loss, drafter_loss = losses(target, drafter, tokens)
        (text_loss + drafter_loss).backward()
    target_optimizers, drafter_optimizers = optimizers(target), optimizers(drafter)
    clear(target_optimizers + drafter_optimizers)
    clock = Clock(args.minutes * CO_TRAINING_SHARE, args.co_training_steps)

    saved = 0.0
    while (progress := clock.progress()) < 1:
        tokens = short.batch(2 * args.batch) if progress < SHORT_WINDOWS_UNTIL else long.batch(args.batch)
        text, imitation = losses(target, drafter, tokens)
        (text + imitation).backward()
        update(target_optimizers, decayed(progress))
        update(drafter_optimizers, max(DISTILLATION_RATE, decayed(progress)))
        clock.step += 1
        if clock.step % 50 == 0:
            report(clock, f"target {text:.3f} drafter {imitation:.3f}")
        if clock.elapsed() - saved > args.save_every * 60:
            saved = clock.elapsed()
            save_pair(args.out, tokenizer, target, drafter)
            now = teacher_forced(target, drafter, held_out, rows=32)
            report(clock, f"saved: {now['loss']:.3f} held-out loss, {now['agreement']:.3f} agreement")
    return target, drafter, clock


def distil(args: argparse.Namespace, target: Llama, drafter: Llama, corpus: Tensor, minutes: float) -> Clock:
    """Train the drafter on the frozen target, over corpus text and the target's own continuations."""
    loss = torch.compile(distillation_loss, dynamic=False, disable=not args.compile)
    windows, prompts = Windows(corpus, WINDOW, args.seed + 2), Windows(corpus, PROMPT, args.seed + 3)
    temperature = torch.tensor([0.0, 0.8]).repeat(args.rows // 2)
    own: list[Tensor] = []
    for tokens in (windows.batch(args.batch), prompts.batch(8 * args.batch).view(-1, CONTINUATION)):  # compile
        loss(target, drafter, tokens).backward()
    made = optimizers(drafter)
    clear(made)
    clock = Clock(minutes, args.distillation_steps)

    while (progress := clock.progress()) < 1:
        if clock.step % 24 == 0 and (not own or progress < 0.9):
            own = own[-5 * args.rows :] + list(
                continue_text(target, prompts.batch(args.rows), CONTINUATION, temperature)
            )
        chosen = torch.stack(random.sample(own, 2 * args.batch))
        imitation = (loss(target, drafter, windows.batch(args.batch)) + loss(target, drafter, chosen)) / 2
        imitation.backward()
        update(made, DISTILLATION_RATE * min(1 - progress, clock.step / 20))
        clock.step += 1
        if clock.step % 50 == 0:
            report(clock, f"distilling {imitation:.3f}")
    return clock


def fine_tune(args: argparse.Namespace, target: Llama, drafter: Llama, mask: int, corpus: Tensor) -> Clock:
    """Train the drafter on the frozen target with masks, over corpus text and the target's own continuations."""
    windows, prompts = Windows(corpus, CONTINUATION, args.seed + 4), Windows(corpus, PROMPT, args.seed + 5)
    temperature = torch.tensor([0.0, 0.0, 0.8]).repeat(args.rows)[: args.rows]
    own: list[Tensor] = []
    made = optimizers(drafter)
    clock = Clock(args.minutes, args.distillation_steps)
    while (progress := clock.progress()) < 1:
        if clock.step % 24 == 0 and (not own or progress < 0.9):
            own = own[-5 * args.rows :] + list(
                continue_text(target, prompts.batch(args.rows), CONTINUATION, temperature)
            )
        num_windows = args.batch // 4
        chosen = torch.stack(random.sample(own, args.batch - num_windows))
        tokens = torch.cat([windows.batch(num_windows), chosen])
        anchors = torch.randperm(CONTINUATION - MASKS - 1)[:GROUPS]
        loss = parallel_loss(target, drafter, tokens, Layout(CONTINUATION, anchors, mask))
        loss.backward()
        update(made, PARALLEL_RATE * min(1 - progress, clock.step / 20 + 0.05))
        clock.step += 1
        if clock.step % 20 == 0:
            report(clock, f"fine-tuning {loss:.3f}")
    return clock


def make_parallel(args: argparse.Namespace, tokenizer: Tokenizer, corpus: Tensor, held_out: Tensor) -> None:
    """Fine-tune the drafter in --out, or what an earlier run made of it, and write it to its own folder there."""
    folder, mask = args.out / "parallel", mask_token(tokenizer)
    target, sequential = load_pair(args.out)
    drafter = load_saved(folder if folder.exists() else args.out / "drafter", DRAFTER)
    clock = fine_tune(args, target, drafter, mask, corpus)
    save_model(folder, tokenizer, drafter, pard_token=mask, spd_type="pard")
    drafters = {"sequential": (sequential, None), "parallel": (load_saved(folder, DRAFTER), mask)}
    accepted = accepted_by_drafts(target, drafters, held_out, REPORTED_DRAFTS)
    report(clock, f"accepted by drafts per round {json.dumps(accepted)}")


def report(clock: Clock, line: str) -> None:
    """Print one line of progress."""
    print(f"[{clock.elapsed():6.0f}s step {clock.step}] {line}", flush=True)


def main() -> None:
    """Train, save and measure the pair."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "tests" / "assets" / "pair")
    parser.add_argument("--minutes", type=float, default=30.0, help="training time; the schedules always complete")
    parser.add_argument("--co-training-steps", type=int, help="follow this step count rather than the clock")
    parser.add_argument("--distillation-steps", type=int, help="follow this step count rather than the clock")
    parser.add_argument("--distil-only", action="store_true", help="keep the target in --out, go on with its drafter")
    parser.add_argument("--parallel", action="store_true", help="fine-tune the drafter in --out with masks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split-seed", type=int, default=0, help="with --parallel: the --seed that the pair came from")
    parser.add_argument("--batch", type=int, default=8, help="windows of 512 tokens per step")
    parser.add_argument("--rows", type=int, default=64, help="continuations generated at a time")
    parser.add_argument("--save-every", type=float, default=5.0, help="minutes between checkpoints")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    random.seed(args.seed)
    torch.manual_seed(args.seed)

    training, held_out_texts = read_sources(args.split_seed if args.parallel else args.seed)
    if args.parallel:
        tokenizer = Tokenizer.from_file(str(args.out / "drafter" / "tokenizer.json"))
    else:
        tokenizer = train_tokenizer(training)
    corpus, held_out = encode(tokenizer, training), encode(tokenizer, held_out_texts)
    print(f"{len(corpus)} training and {len(held_out)} held-out tokens", flush=True)

    if args.parallel:
        make_parallel(args, tokenizer, corpus, held_out)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    history = args.out / "history.txt"
    if args.distil_only:
        target, drafter = load_pair(args.out)
        clock = distil(args, target, drafter, corpus, args.minutes)
        lines = history.read_text() if history.exists() else ""
        lines += f"- `--seed {args.seed} --distil-only --minutes {args.minutes:g}`: {clock.step} distillation steps\n"
    else:
        target, drafter, first = co_train(args, tokenizer, corpus, held_out)
        save_pair(args.out, tokenizer, target, drafter)
        clock = distil(args, target, drafter, corpus, args.minutes * (1 - CO_TRAINING_SHARE))
        lines = f"- `--seed {args.seed} --minutes {args.minutes:g}`: {first.step} co-training steps, "
        lines += f"{clock.step} distillation steps\n"
    history.write_text(lines)
    save_pair(args.out, tokenizer, target, drafter)

    target, drafter = load_pair(args.out)
    text, own = teacher_forced(target, drafter, held_out), on_own_continuations(target, drafter, held_out)
    write_readme(args, corpus, text, own)
    report(clock, f"held-out {text}, own continuations {own}")


if __name__ == "__main__":
    main()
