"""Make the package's tiny language model from scratch: tokenizer, weights, model card.

    python tools/train_tiny_model.py                 # the model that ships; about 40 minutes on 2 CPU cores
    python tools/train_tiny_model.py --steps 100 --out /tmp/tiny      # a minute, to see that it works
    python tools/train_tiny_model.py --architecture qwen3 --steps 3000 --out tiny-qwen3  # another one

The text is the standard library of the Python that runs this (olmoscope.text.standard_library): sources of
modules, and questions about them rendered as the `tiny` recipe renders them. Neither the model nor the tokenizer ever
sees the documents that the recipe holds out. Documents end with EOS, are shuffled and packed into sequences of 512
tokens. Matrix products run under bfloat16 autocast, twice as fast as float32 on CPUs that have it; weights and
optimiser are float32.

The files that are written are measured: the bfloat16 files are loaded again, and the card gives their loss on held-out
text, and that of a unigram and a bigram model on the same tokens. The same Python, torch, threads, seed and machine
give the same model.
"""

import argparse
import math
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from olmoscope.files import write_text
from olmoscope.recipe.load import load_recipe
from olmoscope.recipe.sources import ChatSource
from olmoscope.text.chat import hand_rendered, row_of_chat
from olmoscope.text.document import Document
from olmoscope.text.row import Row
from olmoscope.text.split import is_held_out
from olmoscope.text.standard_library import LICENSE, modules, questions

Ids = npt.NDArray[np.int64]

VOCAB = 4096
EOS, PAD = "<|endoftext|>", "<|pad|>"
SPECIAL_TOKENS = [EOS, PAD, "<|im_start|>", "<|im_end|>"]
POSITIONS = 2048
SEQUENCE = 512
BATCH = 4
LR, WARMUP, WEIGHT_DECAY, CLIP = 3e-3, 100, 0.1, 1.0
LARGEST = 12_000_000
"""Most bytes of the weights and the tokenizer in the package."""


@dataclass(frozen=True)
class Result:
    """Held-out losses in nats per token, by predictor and by part of the text; and the cost of the training."""

    losses: dict[str, dict[str, float]]
    held_out_tokens: dict[str, int]
    training_tokens: int
    epochs: float
    minutes: float


@dataclass(frozen=True)
class Counts:
    """N-gram statistics: probability of each token, count of each pair `[first, second]`."""

    unigram: npt.NDArray[np.float64]
    pairs: npt.NDArray[np.float64]


def main() -> None:
    """Read the arguments and make the model."""
    packaged = Path(__file__).parents[1] / "src" / "olmoscope" / "model" / "tiny"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=packaged, help="folder to write (default: the package's)")
    parser.add_argument("--architecture", choices=list(ARCHITECTURES), default="olmo3", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=4500, help="optimiser steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.architecture != "olmo3" and arguments.out == packaged:
        parser.error("the package's model is olmo3; give another --out")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)

    documents = {False: list(_documents(held_out=False)), True: list(_documents(held_out=True))}
    print(f"{len(documents[False])} documents to train on, {len(documents[True])} held out", flush=True)
    tokenizer = train_tokenizer([document.text for document in documents[False]])
    training = [_encode(tokenizer, document) for document in documents[False]]
    held_out = {
        part: pack([_encode(tokenizer, document) for document in documents[True] if document.source == part])
        for part in ("modules", "questions")}

    started = time.monotonic()
    model = train(training, arguments.architecture, arguments.steps, arguments.seed)
    minutes = (time.monotonic() - started) / 60

    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.out.parent, prefix=".tiny-") as temporary:
        folder = Path(temporary)
        save(folder, model, tokenizer)
        losses = {"this model": model_losses(folder, held_out), **ngram_losses(training, held_out)}
        training_tokens = sum(map(len, training))
        result = Result(
            losses=losses, held_out_tokens={part: rows[:, 1:].size for part, rows in held_out.items()},
            training_tokens=training_tokens, epochs=arguments.steps * BATCH * SEQUENCE / training_tokens,
            minutes=minutes)
        command = f"python tools/train_tiny_model.py --architecture {arguments.architecture} " \
                  f"--steps {arguments.steps} --seed {arguments.seed} --threads {arguments.threads}"
        write_text(folder / "README.md", card(result, model, folder, command, arguments.seed))
        for path in sorted(folder.iterdir()):
            path.chmod(0o644)  # safetensors writes files that only their owner can read
            path.replace(arguments.out / path.name)
    print(_table(result))
    print(f"{result.training_tokens:,} training tokens, {minutes:.1f} minutes; written to {arguments.out}")


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of exactly `VOCAB` tokens: it can spell any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=SPECIAL_TOKENS, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    assert tokenizer.get_vocab_size() == VOCAB
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, model_max_length=POSITIONS,
        extra_special_tokens=SPECIAL_TOKENS[2:], clean_up_tokenization_spaces=False)


def new_olmo3() -> Olmo3ForCausalLM:
    """The architecture of Olmo 3, small: 8 layers, every fourth with full attention."""
    return Olmo3ForCausalLM(Olmo3Config(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=512, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=128,
        layer_types=(["sliding_attention"] * 3 + ["full_attention"]) * 2,
        max_position_embeddings=POSITIONS, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=SPECIAL_TOKENS.index(EOS), pad_token_id=SPECIAL_TOKENS.index(PAD)))


def new_qwen3() -> Qwen3ForCausalLM:
    """Qwen 3, small, and narrower than the Olmo 3 model: 8 layers, norms before attention and feed-forward, full
    attention."""
    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=VOCAB, hidden_size=192, intermediate_size=512, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, head_dim=48, max_position_embeddings=POSITIONS, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=SPECIAL_TOKENS.index(EOS), pad_token_id=SPECIAL_TOKENS.index(PAD)))


ARCHITECTURES: dict[str, Callable[[], PreTrainedModel]] = {"olmo3": new_olmo3, "qwen3": new_qwen3}


def pack(documents: list[Ids]) -> Ids:
    """Sequences of `SEQUENCE` tokens from concatenated documents; the incomplete last one is dropped."""
    stream = np.concatenate(documents)
    return stream[:len(stream) // SEQUENCE * SEQUENCE].reshape(-1, SEQUENCE)


def train(documents: list[Ids], architecture: str, steps: int, seed: int) -> PreTrainedModel:
    """Train a new model with AdamW; the learning rate rises linearly, then falls to 0 as a cosine."""
    model = ARCHITECTURES[architecture]()
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": WEIGHT_DECAY},
                                    {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
        (step + 1) / WARMUP, 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))))
    batches = _batches(documents, seed)
    started, recent = time.monotonic(), 0.0
    for step in range(1, steps + 1):
        loss = _token_losses(model, next(batches)).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        recent += loss.item()
        if step % 50 == 0 or step == steps:
            seconds = time.monotonic() - started
            print(f"step {step}/{steps}  loss {recent / ((step - 1) % 50 + 1):.3f}  "
                  f"{step * BATCH * SEQUENCE / seconds:.0f} tokens/s  "
                  f"{(steps - step) * seconds / step / 60:.1f} minutes left", flush=True)
            recent = 0.0
    return model


def save(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write weights (bfloat16), configuration and tokenizer."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert _size(folder) <= LARGEST, f"{_size(folder)} bytes are over {LARGEST}"


@torch.no_grad()
def model_losses(folder: Path, held_out: dict[str, Ids]) -> dict[str, float]:
    """The loss of the model on disk, in bfloat16 as it will be used."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    return _by_part({part: np.concatenate([
        _token_losses(model, torch.from_numpy(rows[start:start + BATCH])).double().numpy()
        for start in range(0, len(rows), BATCH)]) for part, rows in held_out.items()})


def ngram_losses(training: list[Ids], held_out: dict[str, Ids]) -> dict[str, dict[str, float]]:
    """The losses of a unigram and a bigram model, counted on the training documents, on the same targets.

    The unigram adds one to each count. The bigram is `(count(a, b) + m p(b)) / (count(a) + m)`, with the unigram's p
    and the `m` that is best on a tenth of the training documents if only the others are counted.
    """
    tenth, rest = training[::10], [ids for number, ids in enumerate(training) if number % 10]
    probe = {"tenth": pack(tenth)}
    counted = _count(rest)
    mass = min((2.0 ** power for power in range(-2, 13)),
               key=lambda mass: _bigram_losses(counted, probe, mass)["all"])
    counted = _count(training)
    log_p = np.log(counted.unigram)
    return {"bigram": _bigram_losses(counted, held_out, mass),
            "unigram": _by_part({part: -log_p[rows[:, 1:]] for part, rows in held_out.items()})}


def card(result: Result, model: PreTrainedModel, folder: Path, command: str, seed: int) -> str:
    """The model card."""
    config = model.config
    return f"""---
license: apache-2.0
library_name: transformers
tags: [{config.model_type}, python]
---
# The tiny model of olmoscope

A small causal language model (`{type(model).__name__}`), trained on the Python standard library, so that the whole
pipeline runs anywhere without a download. It has seen nothing else and is good for nothing else.

## Held-out loss

Nats per token, the same tokens in each row. Unigram and bigram models are counted on the training documents;
the bigram is interpolated with the unigram, with the weight that is best on a part of the training documents.

{_table(result)}

Held out are the documents that `is_held_out` (olmoscope.text.split) names at the share of the `tiny` recipe:
whole modules with all questions about them, and topics. Neither the tokenizer nor the model has seen them.
The model's figure is of the bfloat16 files beside this card, on sequences of {SEQUENCE} tokens.

## Architecture

{_describe(config)}, tied embeddings;
{model.num_parameters():,} parameters in bfloat16. Byte-level BPE tokenizer of {config.vocab_size} tokens; EOS is
`{EOS}`. Weights and tokenizer take {_size(folder):,} bytes.

## Text and licence

The standard library of Python {platform.python_version()}: sources of modules, and questions and answers made
of docstrings and of `pydoc`'s topics. Its licence is {LICENSE} (Python Software Foundation License, version 2);
copyright Python Software Foundation. {result.training_tokens:,} training tokens, seen {result.epochs:.1f} times.
The weights come under olmoscope's own licence, Apache-2.0.

## How it was made

    {command}

Seed {seed}, Python {platform.python_version()}, torch {torch.__version__},
transformers {transformers.__version__}, tokenizers {tokenizers.__version__}; {result.minutes:.0f} minutes on the CPU.
AdamW, peak rate {LR}, {WARMUP} warmup steps, cosine to 0, weight decay {WEIGHT_DECAY}, {BATCH} sequences of {SEQUENCE}
tokens a step.
"""


def _describe(config: PreTrainedConfig) -> str:
    """Sizes, in words."""
    attention = "full attention"
    if "sliding_attention" in config.layer_types:
        attention = f"every fourth with full attention, the others with a window of {config.sliding_window} tokens"
    return (f"{config.num_hidden_layers} layers, {attention};\n`d_model` {config.hidden_size}, feed-forward "
            f"{config.intermediate_size}, {config.num_attention_heads} heads, {config.num_key_value_heads} key-value "
            "heads")


def _documents(held_out: bool) -> Iterator[Document]:
    """One side of the recipe's split, rendered as in the recipe."""
    recipe = load_recipe("tiny")
    chat_format = next(source.format for source in recipe.text.sources if isinstance(source, ChatSource))
    assert chat_format != "template"
    share = recipe.text.held_out_share
    for document in modules():
        if is_held_out(document.id, share) == held_out:
            yield document
    for chat in questions():
        if is_held_out(chat.id, share) == held_out:
            row = row_of_chat(chat.messages, chat.id, chat.id, hand_rendered(chat_format))
            assert isinstance(row, Row)
            yield Document(text=row.text, source="questions", id=chat.id)


def _encode(tokenizer: PreTrainedTokenizerFast, document: Document) -> Ids:
    ids = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
    return np.array([*ids, tokenizer.eos_token_id])


def _batches(documents: list[Ids], seed: int) -> Iterator[torch.Tensor]:
    """Endless batches: each epoch shuffles the documents, packs them, and shuffles the sequences."""
    rng = np.random.default_rng(seed)
    while True:
        rows = pack([documents[number] for number in rng.permutation(len(documents))])
        rng.shuffle(rows)
        for start in range(0, len(rows) - BATCH + 1, BATCH):
            yield torch.from_numpy(rows[start:start + BATCH])


def _token_losses(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats of each token except the first, given the tokens before it: `[sequences, tokens - 1]`."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    # Flat rows: a softmax over a middle dimension is several times slower.
    losses = cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.view(len(ids), -1)


def _count(documents: list[Ids]) -> Counts:
    """Counts of tokens and of pairs; no pair crosses the end of a document.

    `unigram` has probabilities, with one added to each count.
    """
    tokens = np.bincount(np.concatenate(documents), minlength=VOCAB).astype(np.float64)
    pairs = np.bincount(np.concatenate([ids[:-1] * VOCAB + ids[1:] for ids in documents]),
                        minlength=VOCAB * VOCAB)
    return Counts((tokens + 1) / (tokens.sum() + VOCAB), pairs.reshape(VOCAB, VOCAB).astype(np.float64))


def _bigram_losses(counts: Counts, held_out: dict[str, Ids], mass: float) -> dict[str, float]:
    totals = counts.pairs.sum(axis=1)
    losses = {}
    for part, rows in held_out.items():
        before, target = rows[:, :-1], rows[:, 1:]
        losses[part] = -np.log((counts.pairs[before, target] + mass * counts.unigram[target])
                               / (totals[before] + mass))
    return _by_part(losses)


def _by_part(losses: dict[str, npt.NDArray[np.float64]]) -> dict[str, float]:
    """Means of each part and, as `all`, of all tokens."""
    return {**{part: float(values.mean()) for part, values in losses.items()},
            "all": float(np.concatenate([values.ravel() for values in losses.values()]).mean())}


def _table(result: Result) -> str:
    sizes = {**result.held_out_tokens, "all": sum(result.held_out_tokens.values())}
    lines = ["| | " + " | ".join(f"{part} ({size:,} tokens)" for part, size in sizes.items()) + " |",
             "|---|" + "---|" * len(sizes)]
    lines += [f"| {name} | " + " | ".join(f"{losses[part]:.3f}" for part in sizes) + " |"
              for name, losses in result.losses.items()]
    return "\n".join(lines)


def _size(folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in ("model.safetensors", "tokenizer.json"))


if __name__ == "__main__":
    main()
