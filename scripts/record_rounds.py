"""Record rounds of speculative decoding with the bundled pair in PyTorch, for `replay_rounds.py`; no engine runs.

    python scripts/record_rounds.py OUT.npz --temperature 0.8 --noise 0.3

Every round drafts K tokens from the drafter's q, cut to its top-M tokens as SSD cuts it, and the target verifies them
by the rule of rejection sampling: text and accept lengths are those of any exact implementation. What the drafter's
distribution says of each draft and each fork point is written down beside the outcome.

`--noise` weakens the drafter: normal noise on each weight matrix, in multiples of its standard deviation. With
`--foresee` the drafter knows the random numbers with which the target accepts drafts and draws bonus tokens.
"""

import argparse
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from bench_prompts import held_out_prompts
from bench_systems import PAIR
from pair_model import DRAFTER, TARGET, Llama, load, weaken
from torch import Tensor

NUM_CANDIDATES = 16
CUTS = (8, 16, 32, 64, 128, 256, 2048)
"""Numbers of tokens that q is cut to in `overlap`; the last is the whole vocabulary."""


@dataclass
class Rounds:
    """Rounds in the order in which they ran, all requests at once.

    request [n]; accept_length [n]; draft_probs [n, K]: the drafter's softmax of each draft, uncut; draft_ranks [n, K];
    candidate_probs [n, K + 1, C]: the drafter's softmax of the likeliest tokens at each fork point, other than the
    draft; token_ids [n, K + 1]: drafts and bonus token; bonus_rank [n]: of the bonus token among all tokens but the
    draft at its fork point; residual_rank [n]: the same when tokens are sorted by max(p - q, 0), by p after full
    acceptance; overlap [n, K, len(CUTS)]: chance that a draft from q cut to CUTS is accepted, nan beyond the first
    rejection. Greedy rounds have the softmax at temperature 1 and overlaps of 0 or 1.

    uniforms [n, K]: the uniform numbers that decided about the drafts if they were foreseen, else nan. Then candidates
    are ranked by log probability plus the target's Gumbel noise, so are their probabilities and bonus_rank, and
    draft_probs are shares of the NUM_CANDIDATES likeliest tokens.
    """

    request: np.ndarray
    accept_length: np.ndarray
    draft_probs: np.ndarray
    draft_ranks: np.ndarray
    candidate_probs: np.ndarray
    token_ids: np.ndarray
    bonus_rank: np.ndarray
    residual_rank: np.ndarray
    overlap: np.ndarray
    uniforms: np.ndarray

    @classmethod
    def load(cls, path: Path) -> "Rounds":
        """What `save` wrote."""
        with np.load(path) as arrays:
            return cls(**{field.name: arrays[field.name] for field in fields(cls)})

    def save(self, path: Path) -> None:
        """Write all arrays to an .npz file."""
        np.savez_compressed(path, **{field.name: getattr(self, field.name) for field in fields(self)})


class Recorder:
    """Decodes a batch of requests, one round of every request at a time.

    Tokens of a round lie in the same cache slots for all requests; which of them were accepted is told by a mask.
    """

    def __init__(self, target: Llama, drafter: Llama, prompts: Tensor, args: argparse.Namespace) -> None:
        self.num_drafts, self.top_m, self.temperature = args.drafts, args.top_m, args.temperature
        self.greedy = args.temperature == 0
        self.advance_one, self.foresees = args.every_position, args.foresee
        batch, length = prompts.shape
        slots = length + args.tokens * (self.num_drafts + 1)
        self.models = target, drafter
        self.caches = tuple(model.new_cache(batch, slots, torch.float32) for model in self.models)
        self.valid = torch.zeros(batch, slots, dtype=torch.bool)
        self.used = length - 1
        self.valid[:, : self.used] = True
        for model, cache in zip(self.models, self.caches):
            model(prompts[:, :-1], cache, 0)
        self.texts: list[list[int]] = [[] for _ in range(batch)]  # what was emitted
        self.last = prompts[:, -1]
        self.positions = torch.full((batch,), length - 1)
        self.num_emitted = torch.zeros(batch, dtype=torch.long)

    def forward(self, which: int, tokens: Tensor, ahead: int) -> Tensor:
        """Logits after `tokens` [B, T], which stand `ahead` tokens behind the last committed one."""
        length = tokens.shape[1]
        start = self.used + ahead
        seen = self.valid[:, None, : start + length].repeat(1, length, 1)
        seen[:, :, self.used :] = torch.ones(length, ahead + length, dtype=torch.bool).tril(ahead)
        positions = self.positions[:, None] + ahead + torch.arange(length)
        return self.models[which](tokens, self.caches[which], start, positions[:, None], seen[:, None])

    def round(self) -> dict[str, Tensor]:
        """Draft, verify and commit a round of every request."""
        k = self.num_drafts
        drafts, logits = [], []
        token = self.last
        for j in range(k + 1):
            logits.append(self.forward(1, token[:, None], j)[:, 0])
            if j < k:
                token = self.draw(logits[-1])
                drafts.append(token)
        drafted = torch.stack(drafts, 1)
        drafter_logits = torch.stack(logits, 1)
        target_logits = self.forward(0, torch.cat((self.last[:, None], drafted), 1), 0)
        q_full, p = (self.softmax(x) for x in (drafter_logits, target_logits))
        if self.greedy:
            p = torch.nn.functional.one_hot(target_logits.argmax(-1), p.shape[-1]).float()
        return self.judge(drafted, p, q_full)

    def judge(self, drafted: Tensor, p: Tensor, q_full: Tensor) -> dict[str, Tensor]:
        """Accept, emit the bonus token, and return what is recorded of the round."""
        k, batch = self.num_drafts, len(drafted)
        least = q_full.topk(self.top_m, -1).values[..., -1:]
        q = torch.where(q_full >= least, q_full, 0.0)
        q = q / q.sum(-1, keepdim=True)
        rows = torch.arange(batch)
        q_drafts = q[:, :k].gather(2, drafted[..., None])[..., 0]
        p_drafts = p[:, :k].gather(2, drafted[..., None])[..., 0]
        uniforms = torch.rand(batch, k)
        accepted = uniforms * q_drafts < p_drafts
        accept_length = accepted.long().cumprod(1).sum(1)
        residual = torch.cat(((p[:, :k] - q[:, :k]).clamp(min=0), p[:, k:]), 1)
        if self.greedy:
            residual = p
        at = residual[rows, accept_length]
        gumbel = -torch.empty_like(p).exponential_().log()
        bonus = (at.log() + gumbel[rows, accept_length]).argmax(1)

        full_drafts = q_full[:, :k].gather(2, drafted[..., None])
        draft_ranks = (q_full[:, :k] > full_drafts).sum(-1)
        without = q_full.clone()
        without[:, :k].scatter_(2, drafted[..., None], -1.0)
        draft_probs = full_drafts[..., 0]
        if self.foresees:
            draft_probs = draft_probs / q_full[:, :k].topk(NUM_CANDIDATES, -1).values.sum(-1)
            without = (without.clamp(min=0).log() + gumbel - gumbel.amax(-1, keepdim=True)).exp()
        candidates = without.topk(NUM_CANDIDATES, -1).values.clamp(min=0)
        there = without[rows, accept_length]
        overlap = self.overlaps(p[:, :k], q_full[:, :k], p_drafts)
        overlap[torch.arange(k)[None] > accept_length[:, None]] = torch.nan

        for text, drafts, count, token in zip(self.texts, drafted.tolist(), accept_length.tolist(), bonus.tolist()):
            text += (*drafts[:count], token)[: 1 if self.advance_one else None]
        self.commit(drafted, accept_length, bonus)
        return {
            "accept_length": accept_length,
            "draft_probs": draft_probs,
            "draft_ranks": draft_ranks,
            "candidate_probs": candidates,
            "token_ids": torch.cat((drafted, bonus[:, None]), 1),
            "bonus_rank": (there > there[rows, bonus][:, None]).sum(1),
            "residual_rank": (at > at[rows, bonus][:, None]).sum(1),
            "overlap": overlap,
            "uniforms": uniforms if self.foresees else torch.full_like(uniforms, torch.nan),
        }

    def commit(self, drafted: Tensor, accept_length: Tensor, bonus: Tensor) -> None:
        """Keep what was emitted: the first token of it with `--every-position`, else all."""
        k = self.num_drafts
        if self.advance_one:
            first = torch.where(accept_length > 0, drafted[:, 0], bonus)
            self.valid[:, self.used] = True
            self.used, self.last = self.used + 1, first
            self.positions += 1
            self.num_emitted += 1
            return
        self.valid[:, self.used : self.used + k + 1] = torch.arange(k + 1)[None] <= accept_length[:, None]
        self.used += k + 1
        self.last = bonus
        self.positions += accept_length + 1
        self.num_emitted += accept_length + 1

    def draw(self, logits: Tensor) -> Tensor:
        """One draft after each row of `logits` [B, V], from q."""
        if self.greedy:
            return logits.argmax(-1)
        values, ids = logits.topk(self.top_m, -1)
        choice = torch.multinomial((values / self.temperature).softmax(-1), 1)
        return ids.gather(1, choice)[:, 0]

    def softmax(self, logits: Tensor) -> Tensor:
        """Probabilities at the temperature, at 1 where it is 0."""
        return (logits / (self.temperature or 1.0)).softmax(-1)

    def overlaps(self, p: Tensor, q: Tensor, p_drafts: Tensor) -> Tensor:
        """Chance that a draft from `q` [B, K, V] cut to each of CUTS is accepted, [B, K, len(CUTS)]."""
        if self.greedy:
            return p_drafts[..., None].repeat(1, 1, len(CUTS))
        q, order = q.sort(-1, descending=True)
        p = p.gather(-1, order)
        cuts = [(p[..., :m], q[..., :m] / q[..., :m].sum(-1, keepdim=True)) for m in CUTS]
        return torch.stack([torch.minimum(*cut).sum(-1) for cut in cuts], -1)


@torch.no_grad()
def record(args: argparse.Namespace) -> Rounds:
    """Rounds until every request has its tokens; a request's later rounds are left out."""
    torch.manual_seed(args.seed)
    target, drafter = load(args.pair / "target", TARGET), load(args.pair / "drafter", DRAFTER)
    if args.noise:
        weaken(drafter, args.noise)
    source = held_out_prompts(args.seed)
    prompts = torch.tensor([next(source) for _ in range(args.prompts)])
    recorder = Recorder(target, drafter, prompts, args)
    found: list[dict[str, np.ndarray]] = []
    while len(rows := (recorder.num_emitted < args.tokens).nonzero()[:, 0]):
        found.append({"request": rows.numpy(), **{name: x[rows].numpy() for name, x in recorder.round().items()}})
    return Rounds(**{name: np.concatenate([part[name] for part in found]) for name in found[0]})


def main() -> None:
    """Record, save and summarise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--pair", type=Path, default=PAIR, help="folder with target and drafter")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--noise", type=float, default=0.0)
    parser.add_argument("--drafts", type=int, default=5, help="K")
    parser.add_argument("--top-m", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--foresee", action="store_true", help="the drafter knows the target's random numbers")
    parser.add_argument("--every-position", action="store_true", help="greedy: a round from every token of the text")
    args = parser.parse_args()
    rounds = record(args)
    rounds.save(args.out)
    first = rounds.overlap[:, 0]
    print(f"{len(rounds.request)} rounds, {rounds.accept_length.mean():.3f} of {args.drafts} drafts accepted")
    print("first draft accepted by cut of q: " + ", ".join(f"{m} {x:.3f}" for m, x in zip(CUTS, first.mean(0))))


if __name__ == "__main__":
    main()
