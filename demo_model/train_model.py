"""Train the demo model: a small LLaMA with its own byte-level BPE tokenizer.

    python demo_model/corpus.py --out build/demo_corpus
    python demo_model/train_model.py --corpus build/demo_corpus --out demo_model/model

Sizes default to 5.5 M parameters, which two CPU cores train in about 70 minutes.
The run checkpoints every few minutes and continues where it stopped when started
again with the same arguments. Matrices are optimised with Muon, the embedding and
the norms with AdamW; the learning rate is warmed up, held, and decayed to zero.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS = "<|begin|>", "<|end|>"


def train_tokenizer(corpus: Path, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE learnt on the first 20 MB of the training text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()

    def sample():
        size = 0
        with open(corpus / "train.jsonl") as lines:
            for line in lines:
                text = json.loads(line)["text"]
                size += len(text)
                yield text
                if size > 20_000_000:
                    return

    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(sample(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS
    )


def tokenise(corpus: Path, split: str, tokenizer, cache: Path) -> np.ndarray:
    """All documents of a split as one uint16 stream: BOS text EOS BOS text EOS ..."""
    path = cache / f"{split}.npy"
    if path.exists():
        return np.load(path, mmap_mode="r")
    pieces: list[np.ndarray] = []
    with open(corpus / f"{split}.jsonl") as lines:
        batch = [json.loads(line)["text"] for line in lines]
    for start in tqdm(range(0, len(batch), 512), desc=f"tokenising {split}"):
        ids = tokenizer(batch[start : start + 512], add_special_tokens=False)
        for row in ids["input_ids"]:
            pieces.append(
                np.array(
                    [tokenizer.bos_token_id, *row, tokenizer.eos_token_id], np.uint16
                )
            )
    stream = np.concatenate(pieces)
    tmp = path.with_suffix(".tmp.npy")
    np.save(tmp, stream)
    tmp.rename(path)
    return stream


def make_model(args, vocab_size: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 11 // 4,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 128,
        head_dim=64,
        max_position_embeddings=args.length_late,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(args.seed)
    return LlamaForCausalLM(config)


def next_token_loss(model, tokens: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy in nats. tokens: [batch, length + 1]."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens[:, :-1]).logits  # [batch, length, vocab]
    return torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), tokens[:, 1:].flatten()
    )


def windows(stream: np.ndarray, starts: np.ndarray, length: int) -> torch.Tensor:
    return torch.from_numpy(
        np.stack([stream[s : s + length + 1].astype(np.int64) for s in starts])
    )


@torch.no_grad()
def held_out_loss(model, stream: np.ndarray, length: int, sequences: int = 64) -> float:
    starts = np.linspace(0, len(stream) - length - 1, sequences).astype(np.int64)
    losses = [
        next_token_loss(model, windows(stream, chunk, length)).item()
        for chunk in np.array_split(starts, sequences // 8)
    ]
    return float(np.mean(losses))


def learning_rate_factor(step: int, steps: int) -> float:
    warm_up, decay = 100, 0.4
    if step < warm_up:
        return (step + 1) / warm_up
    return min(1.0, (steps - step) / (steps * decay))


def train(args) -> None:
    cache = args.work
    cache.mkdir(parents=True, exist_ok=True)
    if (cache / "tokenizer").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(cache / "tokenizer")
    else:
        tokenizer = train_tokenizer(args.corpus, args.vocab)
        tokenizer.save_pretrained(cache / "tokenizer")
    stream = tokenise(args.corpus, "train", tokenizer, cache)
    held_out = tokenise(args.corpus, "held_out", tokenizer, cache)
    model = make_model(args, len(tokenizer))
    parameters = sum(p.numel() for p in model.parameters())
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for n, p in model.named_parameters() if p.ndim == 1 or "embed" in n]
    optimizers = [
        torch.optim.Muon(
            matrices, lr=args.lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    steps = args.tokens // args.batch_tokens
    checkpoint = cache / "checkpoint.pt"
    first, log, runs = 0, [], []
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first, log, runs = state["step"], state["log"], state.get("runs", [])
    # A run continued with more tokens restarts the schedule; the record shows where.
    runs.append({"from_step": first, "steps": steps})
    seen_hours = log[-1]["hours"] if log else 0.0
    began = time.time()
    loss_fn = torch.compile(next_token_loss)
    bar = tqdm(range(first, steps), initial=first, total=steps, mininterval=10)
    for step in bar:
        late = step >= steps * 9 // 10
        length = args.length_late if late else args.length
        # Seeded by the step, so a resumed run sees the batches it would have seen.
        rng = np.random.default_rng([args.seed, step])
        starts = rng.integers(
            0, len(stream) - length - 1, size=args.batch_tokens // length
        )
        # On a CPU, plain matrix products beat the fused attention on short rows.
        model.set_attn_implementation("sdpa" if late else "eager")
        loss = loss_fn(model, windows(stream, starts, length))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * learning_rate_factor(step, steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        bar.set_postfix(loss=f"{loss.item():.3f}")
        if (step + 1) % 250 == 0 or step + 1 == steps:
            log.append(
                {
                    "step": step + 1,
                    "tokens": (step + 1) * args.batch_tokens,
                    "held_out_loss": held_out_loss(model, held_out, args.length),
                    "hours": seen_hours + (time.time() - began) / 3600,
                }
            )
            tqdm.write(json.dumps(log[-1]))
            tmp = checkpoint.with_suffix(".tmp")
            torch.save(
                {
                    "model": model.state_dict(),
                    "optimizers": [o.state_dict() for o in optimizers],
                    "step": step + 1,
                    "log": log,
                    "runs": runs,
                },
                tmp,
            )
            tmp.rename(checkpoint)
    write_model(args, model, tokenizer, parameters, log, runs)


def write_model(args, model, tokenizer, parameters, log: list, runs: list) -> None:
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    provenance = {
        "script": "demo_model/train_model.py",
        "arguments": {k: str(v) for k, v in vars(args).items() if k != "work"},
        "corpus": json.loads((args.corpus / "corpus.json").read_text()),
        "parameters": parameters,
        "runs": runs,
        "final": log[-1],
        "log": log,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    (args.out / "provenance.json").write_text(json.dumps(provenance, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", type=Path, default=Path("build/demo_corpus"))
    parser.add_argument("--work", type=Path, default=Path("build/demo_model"))
    parser.add_argument("--out", type=Path, default=Path("demo_model/model"))
    parser.add_argument("--tokens", type=int, default=22_000_000)
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--length-late", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--lr", type=float, default=0.004)
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())
