"""The bundled drafter as one that drafts in parallel (PARD): what masks are, how they are trained, what they reach."""

import torch
from pair_model import Llama, continue_text
from pair_report import PROMPT
from tokenizers import Tokenizer
from torch import Tensor

NO_TEXT = "ÿ"
"""The token of byte 0xFF in a byte-level vocabulary, which no UTF-8 text has: it stands for the masks."""
MASKS = 9
"""Masks in a row that are trained, so that up to 10 drafts come from one forward."""
DECAY = 0.8
"""Weight of a draft's loss over that of the draft before it, which must be accepted first."""


def mask_token(tokenizer: Tokenizer) -> int:
    """The token id that stands for a draft that is not known yet."""
    token_id = tokenizer.token_to_id(NO_TEXT)
    if token_id is None:
        raise ValueError(f"the vocabulary has no token {NO_TEXT!r}")
    return token_id


class Layout:
    """Texts of `length` tokens followed by groups of masks, each as if it stood after a token of the text of its own.

    anchors [G]: the last token that a group sees. positions [T] and seen [T, T]: as `Llama.forward` takes them.
    """

    def __init__(self, length: int, anchors: Tensor, mask: int) -> None:
        places = torch.arange(1, MASKS + 1)
        self.mask, self.anchors = mask, anchors
        self.positions = torch.cat([torch.arange(length), (anchors[:, None] + places).flatten()])
        group = torch.cat([torch.full((length,), -1), torch.arange(len(anchors)).repeat_interleave(MASKS)])
        last_seen = torch.cat([torch.arange(length), anchors.repeat_interleave(MASKS)])
        of_text = (group == -1)[None, :] & (self.positions[None, :] <= last_seen[:, None])
        own = (group[:, None] == group[None, :]) & (group[:, None] >= 0)
        self.seen = of_text | (own & (self.positions[None, :] <= self.positions[:, None]))

    def logits(self, model: Llama, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """After `tokens` [B, length]: those of the text [B, length, V], and of the masks [B, G, MASKS, V]."""
        batch, length = tokens.shape
        masks = torch.full((batch, len(self.anchors) * MASKS), self.mask)
        logits = model(torch.cat([tokens, masks], 1), positions=self.positions, seen=self.seen)
        return logits[:, :length], logits[:, length:].unflatten(1, (-1, MASKS))


def parallel_loss(target: Llama, drafter: Llama, tokens: Tensor, layout: Layout) -> Tensor:
    """The drafter's loss on the frozen target's distribution and its first choice, after tokens and after masks."""
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            theirs = target(tokens)
        text, masked = layout.logits(drafter, tokens)
    theirs = theirs.float()
    targets = theirs[:, layout.anchors[:, None] + torch.arange(1, MASKS + 1)]  # the target's where each mask stands
    weights = DECAY ** torch.arange(MASKS)
    of_masks = (imitation(masked.float(), targets).mean((0, 1)) * weights).sum() / weights.sum()
    return imitation(text.float(), theirs).mean() + 2 * of_masks


def imitation(logits: Tensor, theirs: Tensor) -> Tensor:
    """Cross-entropy to the distribution and half that to the first choice of `theirs`, [..., V] both."""
    ours = logits.log_softmax(-1)
    first = ours.gather(-1, theirs.argmax(-1, keepdim=True))[..., 0]
    return -(theirs.softmax(-1) * ours).sum(-1) - 0.5 * first


@torch.no_grad()
def accepted_by_drafts(
    target: Llama,
    drafters: dict[str, tuple[Llama, int | None]],
    tokens: Tensor,
    drafts: tuple[int, ...],
    num_prompts: int = 32,
    new: int = 96,
) -> dict[str, dict[int, float]]:
    """Drafts accepted per round on the target's greedy continuations of prompts, by drafter and drafts per round.

    drafters: each with its mask token, None for one that drafts token by token.
    """
    starts = torch.linspace(0, len(tokens) - PROMPT, num_prompts).long().tolist()
    rows = continue_text(target, torch.stack([tokens[s : s + PROMPT] for s in starts]), PROMPT + new)
    return {name: _accepted(model, mask, rows, drafts) for name, (model, mask) in drafters.items()}


def _accepted(model: Llama, mask: int | None, rows: Tensor, drafts: tuple[int, ...]) -> dict[int, float]:
    """Mean accepted drafts by drafts per round, of rounds that follow each other through `rows` [B, T]."""
    length, most = rows.shape[1], max(drafts)
    anchors = torch.arange(PROMPT - 1, length - most)
    following = rows[:, anchors[:, None] + torch.arange(1, most + 1)]
    if mask is None:  # a draft counts where all before it are right, and those are the text
        drafted = model(rows).argmax(-1)[:, anchors[:, None] + torch.arange(most)]
    else:
        drafted = torch.cat([_parallel_drafts(model, mask, rows, some) for some in anchors.split(24)], 1)[..., :most]
    runs = (drafted == following).long().cumprod(-1).sum(-1)
    found = {}
    for k in drafts:
        rounds = accepted = 0
        for row in runs.clamp(max=k).tolist():
            at = 0
            while at < len(row):
                rounds, accepted, at = rounds + 1, accepted + row[at], at + row[at] + 1
        found[k] = accepted / rounds
    return found


def _parallel_drafts(model: Llama, mask: int, rows: Tensor, anchors: Tensor) -> Tensor:
    """Greedy drafts [B, G, MASKS + 1] after the tokens at `anchors` [G] of `rows` [B, T]."""
    text, masked = Layout(rows.shape[1], anchors, mask).logits(model, rows)
    return torch.cat([text[:, anchors, None], masked], 2).argmax(-1)
