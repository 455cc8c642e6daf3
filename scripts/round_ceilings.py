"""What hidden drafting could reach on rounds that `record_rounds.py` recorded, and where hits are lost.

    python scripts/round_ceilings.py sampled T-*.npz
    python scripts/round_ceilings.py greedy G-*.npz        # recorded with --every-position

Rates are in tokens per verification. A draft step of stock speculation takes `--step` verifications, SSD's host
`--handover`; nothing is late and misses have no drafts (`on_miss: skip`). These are computed, not measured.
"""

import argparse
from dataclasses import replace

import numpy as np
from record_rounds import CUTS, NUM_CANDIDATES, Rounds
from replay_rounds import ByConfidence, Levels, Marginal, levels_of, load, replay
from rich.console import Console

console = Console(highlight=False, width=120)


def truncated(rounds: Rounds, num_drafts: int) -> Rounds:
    """The rounds as if `num_drafts` had been drafted: the token after them is the target's, a draft accepted or not."""
    k, longest = num_drafts, rounds.draft_probs.shape[1]
    if k == longest:
        return rounds
    beyond, at = rounds.accept_length > k, rounds.accept_length == k
    draft = rounds.draft_ranks[:, k]
    rank = np.where(beyond, draft, rounds.bonus_rank + (at & (draft <= rounds.bonus_rank)))
    # With the draft among them, the candidates of the last fork point are one more.
    last = np.sort(np.concatenate((rounds.candidate_probs[:, k], rounds.draft_probs[:, k : k + 1]), 1), 1)[:, ::-1]
    candidates = np.concatenate((rounds.candidate_probs[:, :k], last[:, None, :NUM_CANDIDATES]), 1)
    return replace(
        rounds,
        accept_length=np.minimum(rounds.accept_length, k),
        draft_probs=rounds.draft_probs[:, :k],
        draft_ranks=rounds.draft_ranks[:, :k],
        candidate_probs=candidates,
        bonus_rank=rank,
        overlap=rounds.overlap[:, :k],
    )


def accepted_drafts(rounds: Rounds, cut: int) -> list[float]:
    """Mean accepted drafts with 1, 2, … drafts a round, from q cut to `cut` tokens."""
    rates = np.nanmean(rounds.overlap[:, :, CUTS.index(cut)], axis=0)
    return np.cumsum(np.cumprod(rates)).tolist()


def undrafted_hits(rounds: Rounds, budget: int) -> float:
    """Chance that the target's next token is among the candidates where nothing was drafted."""
    first = rounds.draft_ranks[:, 0]
    other = rounds.bonus_rank + (first <= rounds.bonus_rank)
    rank = np.where(rounds.accept_length > 0, first, other)
    return float((rank < min(budget, NUM_CANDIDATES)).mean())


def sampled(rounds: Rounds, args: argparse.Namespace) -> None:
    """Stock speculation, SSD and its ceiling at each K; the acceptance of q by its cut; ranks by what they are of."""
    console.print("accepted drafts with K = 5, by tokens that q keeps:")
    console.print("  " + ", ".join(f"{cut}: {accepted_drafts(rounds, cut)[-1]:.3f}" for cut in CUTS))
    rejected = rounds.accept_length < rounds.draft_probs.shape[1]
    for name, ranks in (("q", rounds.bonus_rank), ("max(p - q, 0)", rounds.residual_rank)):
        shares = [f"{f}: {(ranks[rejected] < f).mean():.3f}" for f in (1, 2, 4, 8, 16)]
        console.print(f"  bonus tokens of rejections among the first F by {name}: {', '.join(shares)}")
    full, cut = accepted_drafts(rounds, CUTS[-1]), accepted_drafts(rounds, 64)
    stock = [(1 + a) / (1 + args.step * k) for k, a in enumerate(full, 1)]
    best = max(stock)
    console.print(
        f"best stock {best:.3f} at K = {stock.index(best) + 1}, in tokens a verification; as multiples of it:"
    )
    after_miss = undrafted_hits(rounds, args.budget)
    for k in range(1, len(full) + 1):
        short = truncated(rounds, k)
        hits = replay(short, levels_of(short), ByConfidence(k, args.budget))[300:].mean()
        drafted = after_miss / (1 - hits + after_miss)
        ssd = (1 + drafted * cut[k - 1]) / (1 + args.handover)
        console.print(
            f"  K = {k}: stock {stock[k - 1] / best:.2f}, drafting free {(1 + full[k - 1]) / best:.2f}, "
            f"every outcome hit {(1 + cut[k - 1]) / (1 + args.handover) / best:.2f}, SSD {ssd / best:.2f} "
            f"(hits {100 * hits:.0f} %, {100 * after_miss:.0f} % without drafts)"
        )


class Text:
    """A request's greedy text with a round from every token."""

    def __init__(self, rounds: Rounds, levels: list[Levels]) -> None:
        self.rounds, self.levels = rounds, levels
        first = np.where(rounds.accept_length > 0, rounds.token_ids[:, 0], rounds.token_ids[:, -1])
        self.tokens = first.tolist()  # the token after each place

    def continued(self, place: int, drafts: list[int]) -> int:
        """How many of `drafts` the target would accept after `place` tokens."""
        following = self.tokens[place : place + len(drafts)]
        count = 0
        for draft, token in zip(drafts, following):
            if draft != token:
                break
            count += 1
        return count


def play(texts: list[Text], policy: Marginal, oracle: bool, verbose: bool) -> float:
    """Tokens a round of SSD without drafts after a miss; prints where hits are lost."""
    num_drafts = policy.num_drafts
    tokens = rounds = drafted = 0
    lost = {"at a fork point without branches": 0, "beyond the branches there": 0, "beyond all candidates": 0}
    by_length = np.zeros((num_drafts + 1, 2), int)
    undrafted = np.zeros(2, int)
    spine = {"in place of the rejected draft": 0, "before it": 0}
    misses = 0
    for text in texts:
        place, has_drafts, after_hit = 0, False, False
        while place < len(text.tokens):
            r, rounds = text.rounds, rounds + 1
            k = int(r.accept_length[place]) if has_drafts else 0
            if has_drafts:
                rank, known = int(r.bonus_rank[place]), NUM_CANDIDATES - (k < num_drafts)
                seen = rank if rank < known else None
                counts = policy.counts(text.levels[place], after_hit, k)
                hit = seen is not None and (oracle or seen < counts[k])
                policy.learn(text.levels[place], after_hit, k, seen)
                by_length[k] += (1, hit)
                drafted += 1
                if not hit:
                    reason = (seen is None) * 2 or int(counts[k] > 0)
                    lost[list(lost)[reason]] += 1
                    if k < num_drafts:
                        misses += 1
                        drafts = r.token_ids[place, :num_drafts].tolist()
                        spine["in place of the rejected draft"] += text.continued(place + k + 1, drafts[k + 1 :])
                        spine["before it"] += text.continued(place + k + 1, drafts[k:])
            else:
                rank = 0 if r.accept_length[place] else int(r.bonus_rank[place]) + 1
                hit = rank < (NUM_CANDIDATES if oracle else min(policy.budget, NUM_CANDIDATES))
                undrafted += (1, hit)
            tokens += k + 1
            place += k + 1
            has_drafts, after_hit = hit, has_drafts and hit
    if verbose:
        console.print(f"  {rounds} rounds, {drafted} with drafts; misses of these: {lost}")
        lengths = ", ".join(
            f"k = {k}: {n} rounds, {100 * h / max(n, 1):.0f} % hit" for k, (n, h) in enumerate(by_length)
        )
        console.print(f"  {lengths}; without drafts {100 * undrafted[1] / undrafted[0]:.0f} %")
        answers = ", ".join(f"{name} {count / max(misses, 1):.2f}" for name, count in spine.items())
        console.print(f"  drafts accepted a miss if the spine's own went on {answers}")
    return tokens / rounds


def greedy(rounds: Rounds, args: argparse.Namespace) -> None:
    """Stock speculation and SSD with and without confidence, and where hits are lost."""
    accepted = [float(np.minimum(rounds.accept_length, k).mean()) for k in range(1, rounds.draft_probs.shape[1] + 1)]
    agreement = float((rounds.accept_length > 0).mean())
    console.print(f"agreement {agreement:.3f} over all places")
    for k in range(2, rounds.draft_probs.shape[1] + 1):
        short = truncated(rounds, k)
        levels = levels_of(short)
        texts = []
        for request in np.unique(short.request):
            at = np.flatnonzero(short.request == request)
            part = Rounds(**{name: value[at] for name, value in vars(short).items()})
            texts.append(Text(part, [levels[i] for i in at]))
        stock = stock_rates(texts, k)
        best = max(rate / (1 + args.step * j) for j, rate in enumerate(stock, 1))
        console.print(f"K = {k} (accepted from any place {accepted[k - 1]:.2f}); best stock {best:.3f}")
        for name, policy, oracle in (
            ("marginal", Marginal(k, args.budget), False),
            ("confidence", ByConfidence(k, args.budget), False),
            ("all candidates", Marginal(k, args.budget), True),
        ):
            rate = play(texts, policy, oracle, name == "confidence") / (1 + args.handover)
            console.print(f"  {name}: {rate:.3f} tokens a verification, {rate / best:.2f} x the best stock")
        console.print(f"  every outcome hit: {stock[-1] / (1 + args.handover) / best:.2f} x")


def stock_rates(texts: list[Text], most: int) -> list[float]:
    """Tokens a round with 1, 2, … drafts in every round."""
    found = []
    for k in range(1, most + 1):
        tokens = rounds = 0
        for text in texts:
            place = 0
            while place < len(text.tokens):
                step = min(int(text.rounds.accept_length[place]), k) + 1
                place, tokens, rounds = place + step, tokens + step, rounds + 1
        found.append(tokens / rounds)
    return found


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("sampled", "greedy"))
    parser.add_argument("pattern")
    parser.add_argument("--budget", type=int, default=24, help="branches a round")
    parser.add_argument("--step", type=float, default=0.25, help="stock's draft step, in verifications")
    parser.add_argument("--handover", type=float, default=0.02, help="SSD's host time a round, in verifications")
    args = parser.parse_args()
    {"sampled": sampled, "greedy": greedy}[args.kind](load(args.pattern), args)


if __name__ == "__main__":
    main()
