"""Train the bundled target and drafter on the Python standard library's own sources.

The two models are co-trained: every step the target learns the text and the drafter learns the
target's distribution from the same forward pass. A last phase freezes the target and distils the
drafter further, half on corpus text and half on the target's own continuations.

    python scripts/train_pair.py --minutes 30
"""

import argparse
import json
import math
import os
import platform
import random
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 2048
MAX_POSITIONS = 2048
ROPE_THETA = 10000.0
NORM_EPS = 1e-5
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "encodings", "pydoc_data"}
HELD_OUT_SHARE = 0.04
CO_TRAINING_SHARE = 0.7  # of the time budget; the rest distils the drafter alone
WARM_UP_SHARE = 0.02  # of co-training
HOLD_UNTIL = 0.35  # of co-training
DISTILLATION_RATE = 0.35  # share of the peak learning rates at which distillation starts
WINDOW = 512
SHORT_WINDOW = 256  # attention over short windows is cheaper: co-training begins on them
SHORT_WINDOWS_UNTIL = 0.65  # of co-training
CONTINUATION = SHORT_WINDOW  # tokens of one self-generated row, prompt included
PROMPT = 64


# ---------------------------------------------------------------------------------------- model


@dataclass(frozen=True)
class Shape:
    """The sizes in which target and drafter differ, and those they share."""

    layers: int
    intermediate: int
    hidden: int = 256
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64

    def config(self) -> dict:
        """Return the checkpoint's config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": VOCABULARY,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": MAX_POSITIONS,
            "rms_norm_eps": NORM_EPS,
            "rope_theta": ROPE_THETA,
            "rope_scaling": None,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "initializer_range": 0.02,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "torch_dtype": "bfloat16",
        }


TARGET = Shape(layers=5, intermediate=768)
DRAFTER = Shape(layers=2, intermediate=256)


class RMSNorm(nn.Module):
    """Llama's root-mean-square normalisation."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + NORM_EPS) * self.weight


class Attention(nn.Module):
    """Grouped-query causal attention with rotary positions."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden, queries, bias=False)
        self.k_proj = nn.Linear(shape.hidden, keys, bias=False)
        self.v_proj = nn.Linear(shape.hidden, keys, bias=False)
        self.o_proj = nn.Linear(queries, shape.hidden, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], cache=None, start: int = 0) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            projection(x).view(batch, length, -1, self.shape.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, rotation), rotate(k, rotation)
        if cache is not None:
            keys, values = cache
            keys[:, :, start : start + length] = k
            values[:, :, start : start + length] = v
            k, v = keys[:, :, : start + length], values[:, :, : start + length]
        groups = self.shape.heads // self.shape.kv_heads
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=start == 0)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    """Llama's gated feed-forward block."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.down_proj = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One pre-norm decoder layer."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor, rotation, cache=None, start: int = 0) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation, cache, start)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """A Llama decoder whose parameter names are those of the published checkpoint format."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.hidden)


class Llama(nn.Module):
    """A small Llama with tied embeddings; returns logits."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.model = Decoder(shape)
        frequency = ROPE_THETA ** (-torch.arange(0, shape.head_dim, 2) / shape.head_dim)
        angle = torch.outer(torch.arange(MAX_POSITIONS), frequency).repeat(1, 2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        for name, weight in self.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                nn.init.zeros_(weight)
            elif weight.ndim == 2:
                nn.init.normal_(weight, std=0.02 if "embed" in name else shape.hidden**-0.5)

    def forward(self, tokens: Tensor, cache=None, start: int = 0) -> Tensor:
        end = start + tokens.shape[1]
        rotation = self.cos[start:end], self.sin[start:end]
        x = self.model.embed_tokens(tokens)
        for i, layer in enumerate(self.model.layers):
            x = layer(x, rotation, None if cache is None else cache[i], start)
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)

    def new_cache(self, batch: int, length: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """Return empty keys and values for every layer."""
        size = batch, self.shape.kv_heads, length, self.shape.head_dim
        return [(torch.empty(size, dtype=dtype), torch.empty(size, dtype=dtype)) for _ in self.model.layers]


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Apply rotary positions, pairing each dimension with the one half a head away."""
    cos, sin = rotation
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)


# ----------------------------------------------------------------------------------------- data


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


# ------------------------------------------------------------------------------------- training


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


@torch.no_grad()
def continue_text(model: Llama, prompts: Tensor, length: int, temperature: Tensor | None = None) -> Tensor:
    """Continue each prompt to `length` tokens, greedily where its temperature is zero or absent."""
    dtype = torch.float32 if temperature is None else torch.bfloat16  # exact to measure, fast to train on
    cache = model.new_cache(len(prompts), length, dtype)
    row, fed = prompts, 0
    while row.shape[1] < length:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(row[:, fed:], cache, fed)[:, -1].float()
        fed, choice = row.shape[1], logits.argmax(-1)
        if temperature is not None:
            sampled = torch.multinomial((logits / temperature.clamp(min=0.1)[:, None]).softmax(-1), 1)[:, 0]
            choice = torch.where(temperature > 0, sampled, choice)
        row = torch.cat((row, choice[:, None]), 1)
    return row


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
        sum(losses(target, drafter, tokens)).backward()
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


def report(clock: Clock, line: str) -> None:
    """Print one line of progress."""
    print(f"[{clock.elapsed():6.0f}s step {clock.step}] {line}", flush=True)


# ----------------------------------------------------------------------------- saving, measuring


def save_pair(out: Path, tokenizer: Tokenizer, target: Llama, drafter: Llama) -> None:
    """Write both checkpoints with their tokenizer, each weight file replaced in one move."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
    }
    for name, model in (("target", target), ("drafter", drafter)):
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
        (folder / "config.json").write_text(json.dumps(model.shape.config(), indent=2) + "\n")
        weights = {key: value.detach().bfloat16().contiguous() for key, value in model.state_dict().items()}
        save_file(weights, folder / "model.safetensors.part", {"format": "pt"})
        (folder / "model.safetensors.part").chmod(0o644)
        os.replace(folder / "model.safetensors.part", folder / "model.safetensors")


def load_saved(folder: Path, shape: Shape) -> Llama:
    """Return a written checkpoint in float32, after checking that transformers agrees with it."""
    from transformers import AutoModelForCausalLM

    model = Llama(shape)
    model.load_state_dict({key: value.float() for key, value in load_file(folder / "model.safetensors").items()})
    tokens = torch.randint(VOCABULARY, (2, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
        torch.testing.assert_close(model(tokens), reference, atol=1e-3, rtol=1e-3)
    return model


def load_pair(folder: Path) -> tuple[Llama, Llama]:
    """Return the written target and drafter."""
    return load_saved(folder / "target", TARGET), load_saved(folder / "drafter", DRAFTER)


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


def main() -> None:
    """Train, save and measure the pair."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "tests" / "assets" / "pair")
    parser.add_argument("--minutes", type=float, default=30.0, help="training time; the schedules always complete")
    parser.add_argument("--co-training-steps", type=int, help="follow this step count rather than the clock")
    parser.add_argument("--distillation-steps", type=int, help="follow this step count rather than the clock")
    parser.add_argument("--distil-only", action="store_true", help="keep the target in --out, go on with its drafter")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=8, help="windows of 512 tokens per step")
    parser.add_argument("--rows", type=int, default=64, help="continuations generated at a time")
    parser.add_argument("--save-every", type=float, default=5.0, help="minutes between checkpoints")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    random.seed(args.seed)
    torch.manual_seed(args.seed)

    training, held_out_texts = read_sources(args.seed)
    tokenizer = train_tokenizer(training)
    corpus, held_out = encode(tokenizer, training), encode(tokenizer, held_out_texts)
    print(f"{len(corpus)} training and {len(held_out)} held-out tokens", flush=True)

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
