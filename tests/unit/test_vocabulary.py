"""A draft model with other token ids than the target's drafts as one with the same, and never what the target lacks."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch
from engine_target import K, Target, drive, engine_of, grow
from fake_model import FakePagedModel, reference_logits

from vllm_ssd.compat.drafter.paged import ForwardBatch, TreeBatch
from vllm_ssd.drafter.vocabulary import UnlikeVocabularies, Vocabulary, VocabularyMap, match, texts, translated
from vllm_ssd.link.protocol import Push, encode

NAMES = [f"t{i}" for i in range(FakePagedModel.vocab_size)]
ORDER = np.random.default_rng(0).permutation(len(NAMES))
"""The original's token of each id of a permuted draft model."""
IN_ORDER = np.argsort(ORDER)


class PermutedModel(FakePagedModel):
    """The original with its token ids in another order, as if the rows of its embedding and its head were moved."""

    def forward(self, batch: ForwardBatch | TreeBatch) -> torch.Tensor:
        order = torch.from_numpy(ORDER.astype(np.int32))
        token_ids = order[batch.token_ids] if isinstance(batch, TreeBatch) else ORDER.astype(np.int32)[batch.token_ids]
        return super().forward(dataclasses.replace(batch, token_ids=token_ids))[:, ORDER]


def permuted(num_pages: int, tree_attention: bool, **options: int) -> Target:
    model = PermutedModel(num_pages, tree_attention=tree_attention)
    vocabulary = match(
        Vocabulary(len(NAMES), NAMES), Vocabulary(len(NAMES), [NAMES[i] for i in ORDER]), 0, heterogeneous=True
    )
    assert vocabulary.draft_token_ids.tolist() == IN_ORDER.tolist() and vocabulary.num_shared == len(NAMES)
    return Target(translated(model, vocabulary), **options)


def record(target: Target) -> list[bytes]:
    """All that the engine of `target` pushes from now on."""
    pushed: list[bytes] = []
    speculate = target.engine.speculate

    def recorded() -> Push | None:
        push = speculate()
        pushed.append(b"" if push is None else encode(push))
        return push

    target.engine.speculate = recorded
    return pushed


@pytest.mark.parametrize("tree_attention", [False, True], ids=["host pages", "device pages"])
def test_a_draft_model_with_permuted_ids_pushes_the_same_blocks(tree_attention, monkeypatch):
    """The exact oracle: greedy and sampled, through hits, misses, preemptions and a small pool of pages."""
    monkeypatch.setattr("time.perf_counter", lambda: 0.0)  # when a block is pushed depends on time
    original = Target(FakePagedModel(90, tree_attention=tree_attention), max_num_seqs=3)
    other = permuted(90, tree_attention, max_num_seqs=3)
    expected, found = record(original), record(other)
    for target in (original, other):
        drive(target, random.Random(1), 30)
    assert found == expected and sum(map(len, expected)) > 5_000


def checked(num_pages: int, tree_attention: bool, vocabulary: VocabularyMap, **options: int) -> Target:
    """A target whose engine has `vocabulary`, and is checked against logits that are translated token by token."""
    model = translated(FakePagedModel(num_pages, tree_attention=tree_attention), vocabulary)
    ids, shared = vocabulary.draft_token_ids.tolist(), vocabulary.shared.tolist()

    def reference(prefix: list[int]) -> torch.Tensor:
        own = reference_logits([ids[token] for token in prefix])
        return torch.stack([own[i] if s else own.new_tensor(-torch.inf) for i, s in zip(ids, shared)])

    model.reference_logits = reference
    target = Target(model, **options)
    target.engine = engine_of(model, num_draftable=vocabulary.num_shared, **options)
    return target


STAND_IN = 4
SIZES = {
    "target padded": (Vocabulary(16, NAMES), Vocabulary(13, NAMES)),
    "draft padded": (Vocabulary(10, NAMES[:10]), Vocabulary(13, NAMES)),
    "no tokenizer": (Vocabulary(13), Vocabulary(13, NAMES)),
}
MAPS = {
    **{name: match(target, draft, STAND_IN, False) for name, (target, draft) in SIZES.items()},
    "one token differs": VocabularyMap(
        np.where(np.arange(13) == 2, STAND_IN, np.arange(13)).astype(np.int32), np.arange(13) != 2
    ),
    "few shared": match(
        Vocabulary(11, ["x", "t3", "y", "t1", "t12", "z", "t9", "t0", "t7", "", "t2"]),
        Vocabulary(13, NAMES),
        STAND_IN,
        True,
    ),
}


@pytest.mark.parametrize("tree_attention", [False, True], ids=["host pages", "device pages"])
@pytest.mark.parametrize("name", MAPS)
def test_only_shared_tokens_are_drafted_and_unknown_ones_stand_for_others(name, tree_attention):
    """Every id of the target in the context, in drafts and as bonus token; every draft and q against the reference."""
    vocabulary = MAPS[name]
    target = checked(300, tree_attention, vocabulary, max_num_seqs=2)
    rng, num_ids, seen = random.Random(0), len(vocabulary.shared), set()
    for temperature in (0.0, 0.8):
        target.open("a", list(range(num_ids)), temperature)
        for _ in range(8):
            grow(target)
            block = target.blocks["a"]
            seen |= {bonus for _, bonus in block} | {token for drafts in block.values() for token in drafts}
            outcome = rng.choice(sorted(block))
            if rng.random() < 0.5:
                target.advance("a", [*target.drafts["a"][: outcome[0]], outcome[1]], list(block[outcome]))
            else:
                target.advance("a", [rng.randrange(num_ids)], [rng.randrange(num_ids) for _ in range(K)])
    assert seen <= set(np.flatnonzero(vocabulary.shared).tolist()) and len(seen) > 5
    assert not target.evicted


def test_equal_vocabularies_leave_the_model_as_it_is():
    model = FakePagedModel(10)
    vocabulary = match(Vocabulary(13, NAMES), Vocabulary(13, list(NAMES)), 0, False)
    assert translated(model, vocabulary) is model and not vocabulary.notice


def test_padding_is_told_and_added_tokens_are_not_drafted():
    """Qwen2.5's tokenizer in vocabularies of two sizes, and a target with three tokens added to it."""
    names = [f"t{i}" for i in range(1500)]
    vocabulary = match(Vocabulary(1521, names), Vocabulary(1519, names), 7, False)
    assert vocabulary.notice == "the draft model shares 1,500 of the target's 1,500 tokens (100.0%) with the target"
    assert vocabulary.num_shared == 1519 and vocabulary.draft_token_ids[1518:].tolist() == [1518, 7, 7]
    vocabulary = match(Vocabulary(1503, [*names, "<a>", "<b>", "<c>"]), Vocabulary(1503, names), 7, False)
    assert "1,500 of the target's 1,503" in vocabulary.notice and not vocabulary.shared[1500:].any()
    assert vocabulary.draft_token_ids[1500:].tolist() == [7, 7, 7]


@pytest.mark.parametrize(
    ("target", "draft", "heterogeneous", "reason"),
    [
        (NAMES, NAMES[::-1], False, r"only 1 of the target's 13 tokens \(7.7%\).*heterogeneous_vocab: true"),
        (NAMES, ["a", "b"], True, "no token"),
        ([], NAMES[:9], False, "13 ids, the draft model's 9, and without both tokenizers"),
        (NAMES, [], True, "without both tokenizers"),
    ],
)
def test_unlike_vocabularies_are_refused_in_words(target, draft, heterogeneous, reason):
    with pytest.raises(UnlikeVocabularies, match=reason):
        match(Vocabulary(13, target), Vocabulary(len(draft) or 20, draft), 0, heterogeneous)


def test_tokens_are_matched_by_the_text_they_stand_for():
    byte_level = ["Ġ", "Ċ", "Ġthe", "Ã©", "<|end|>", "!"]
    sentence_piece = ["▁", "<0x0A>", "▁the", "é", "<|end|>", "<0x21>"]
    assert texts(byte_level) == texts(sentence_piece) == [b" ", b"\n", b" the", "é".encode(), b"<|end|>", b"!"]
    assert texts(["a", "##b", "<0x0A>"]) == [b"a", b"##b", b"<0x0A>"]
    vocabulary = match(Vocabulary(6, byte_level), Vocabulary(6, sentence_piece[::-1]), 5, True)
    assert vocabulary.draft_token_ids.tolist() == [5, 4, 3, 2, 1, 0] and vocabulary.shared.all()


def test_of_two_ids_for_one_text_one_is_drafted():
    vocabulary = match(Vocabulary(4, ["a", "a", "b", ""]), Vocabulary(3, ["b", "a", "a"]), 2, True)
    assert vocabulary.draft_token_ids.tolist() == [1, 2, 0, 2]
    assert vocabulary.shared.tolist() == [True, False, True, False]
