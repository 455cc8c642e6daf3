"""The text the bundled pair is trained on: the Python standard library's own sources."""

import random
import sysconfig
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 2048
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "encodings", "pydoc_data"}
HELD_OUT_SHARE = 0.04


def read_sources(seed: int) -> tuple[list[str], list[str]]:
    """Return the standard library's modules as training texts and held-out texts."""
    root = Path(sysconfig.get_path("stdlib"))
    texts = []
    for path in sorted(root.rglob("*.py")):
        if not SKIPPED_FOLDERS.intersection(path.relative_to(root).parts[:-1]):
            texts.append(path.read_text(encoding="utf-8", errors="ignore"))
    random.Random(seed).shuffle(texts)
    held_out = round(len(texts) * HELD_OUT_SHARE)
    return texts[held_out:], texts[:held_out]


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Train a byte-level BPE tokenizer whose first token ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """Return the texts as one row of tokens, each text closed by the end-of-text token."""
    ids = [token for item in tokenizer.encode_batch(texts) for token in (*item.ids, 0)]
    return torch.tensor(ids)


class Windows:
    """An endless seeded walk over a row of tokens: shuffled windows, shifted anew every epoch."""

    def __init__(self, tokens: Tensor, length: int, seed: int):
        self.tokens, self.length = tokens, length
        self.generator = torch.Generator().manual_seed(seed)
        self.starts: list[int] = []

    def batch(self, size: int) -> Tensor:
        """Return the next `size` windows."""
        while len(self.starts) < size:
            shift = int(torch.randint(self.length, (), generator=self.generator))
            count = (len(self.tokens) - shift) // self.length
            order = torch.randperm(count, generator=self.generator) * self.length + shift
            self.starts += order.tolist()
        chosen, self.starts = self.starts[:size], self.starts[size:]
        return torch.stack([self.tokens[s : s + self.length] for s in chosen])
