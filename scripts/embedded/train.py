"""Train the embedded model from scratch on the cleaned reviews, and write everything that ships with it.

    python -m scripts.embedded.train --reviews scripts/data/reviews.jsonl.gz --out ppo_jax/assets

Writes `tiny_reviews/` (weights, tokenizer, model card) and `prompts.jsonl` below --out, with the weights of the epoch
that had the lowest held-out perplexity. Ctrl-C ends the training early and writes the best so far.
"""

import argparse
import gzip
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

PAD, EOS = "<pad>", "<eos>"
MAX_NEW_TOKENS = 48


def prompt(thing: str) -> str:
    return f"Review of {thing}:"


def make_tokenizer(lines: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every text can be encoded, and decoding gives it back."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[PAD, EOS], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.width,
        intermediate_size=args.mlp,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)

    # The corpus is small for the model, and the stock Llama has no dropout but in the attention.
    def drop(module, _, output):
        kept = torch.nn.functional.dropout(
            output[0] if isinstance(output, tuple) else output, args.dropout, module.training
        )
        return (kept, *output[1:]) if isinstance(output, tuple) else kept

    for module in [
        model.model.embed_tokens,
        *(m for layer in model.model.layers for m in (layer.self_attn, layer.mlp)),
    ]:
        module.register_forward_hook(drop)
    return model


def encode(tokenizer: PreTrainedTokenizerFast, reviews: list[dict]) -> list[tuple[list[int], int]]:
    """For each review its tokens, the EOS included, and how many of them are the prompt."""
    rows = []
    for review in reviews:
        asked = tokenizer(prompt(review["thing"]))["input_ids"]
        answer = tokenizer(" " + review["text"])["input_ids"]
        rows.append((asked + answer + [tokenizer.eos_token_id], len(asked)))
    return rows


def batches(rows: list, batch_size: int, rng: random.Random) -> Iterator[list]:
    """Shuffled batches of rows of similar length, so that little of a batch is padding."""
    order = rng.sample(rows, len(rows))
    pool = 20 * batch_size
    found = []
    for start in range(0, len(order), pool):
        near = sorted(order[start : start + pool], key=lambda row: len(row[0]))
        found += [near[i : i + batch_size] for i in range(0, len(near), batch_size)]
    rng.shuffle(found)
    yield from found


def token_losses(model: LlamaForCausalLM, rows: list) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of every next token [rows, length - 1], 0 on padding; and where the response is."""
    length = max(len(ids) for ids, _ in rows)
    tokens = torch.tensor([ids + [model.config.pad_token_id] * (length - len(ids)) for ids, _ in rows])
    sizes = torch.tensor([len(ids) for ids, _ in rows])[:, None]
    starts = torch.tensor([n for _, n in rows])[:, None]
    targets = torch.arange(1, length)
    is_real, is_response = targets < sizes, (targets < sizes) & (targets >= starts)
    # Padding stands on the right, where causal attention never looks back at it: no attention mask is needed.
    logits = model(tokens[:, :-1], use_cache=False).logits
    losses = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return losses.view(is_real.shape) * is_real, is_response


def train_epoch(model: LlamaForCausalLM, epoch_batches: list, optimizer, schedule) -> float:
    """One pass over the batches; the mean loss per token."""
    model.train()
    total = count = 0.0
    for batch in epoch_batches:
        losses, _ = token_losses(model, batch)
        n = sum(len(ids) - 1 for ids, _ in batch)
        (losses.sum() / n).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        total, count = total + losses.sum().item(), count + n
    return total / count


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, rows: list) -> float:
    """Per response token, the EOS among them."""
    model.eval()
    total = count = 0.0
    for start in range(0, len(rows), 128):
        losses, is_response = token_losses(model, rows[start : start + 128])
        total += (losses * is_response).sum().item()
        count += is_response.sum().item()
    return math.exp(total / count)


@torch.no_grad()
def sample_stats(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, things: list[str], n: int
) -> tuple[dict, list]:
    """How the model's answers at temperature 1 look as numbers, and the answers: (thing, answer, VADER compound)."""
    model.eval()
    torch.manual_seed(0)
    asked = [things[i % len(things)] for i in range(n)]
    inputs = tokenizer([prompt(thing) for thing in asked], return_tensors="pt", padding=True)
    ids = model.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
        do_sample=True, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=MAX_NEW_TOKENS,
    )[:, inputs["input_ids"].shape[1] :]  # fmt: skip
    ended = (ids == tokenizer.eos_token_id).any(1)
    lengths = (ids != tokenizer.pad_token_id).sum(1)
    answers = tokenizer.batch_decode(ids, skip_special_tokens=True)
    vader = SentimentIntensityAnalyzer()
    scores = torch.tensor([vader.polarity_scores(answer)["compound"] for answer in answers])
    stats = {
        "n_samples": n,
        "mean_length": lengths.float().mean().item(),
        "ended": ended.float().mean().item(),
        "max_new_tokens": MAX_NEW_TOKENS,
        "vader_mean": scores.mean().item(),
        "vader_std": scores.std(correction=0).item(),
        "vader_negative": (scores < -0.05).float().mean().item(),
        "vader_positive": (scores > 0.05).float().mean().item(),
    }
    return stats, list(zip(asked, answers, scores.tolist(), strict=True))


def rounded_to_bfloat16(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A float32 model with the weights that ship, so that what is measured is what is used."""
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict({name: w.bfloat16().float() for name, w in model.state_dict().items()})
    return copy


def write_assets(out: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, facts: dict) -> None:
    """The model directory, with a card that states `facts`."""
    folder = out / "tiny_reviews"
    model = rounded_to_bfloat16(model).bfloat16()  # a copy: the caller's stays float32
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=MAX_NEW_TOKENS,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    card = Path(__file__).with_name("card.md").read_text()
    size = (folder / "model.safetensors").stat().st_size
    (folder / "README.md").write_text(card.format(**facts, bytes=size))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reviews", type=Path, default=Path("scripts/data/reviews.jsonl.gz"), help="made by clean")
    parser.add_argument("--out", type=Path, default=Path("ppo_jax/assets"), help="directory to write into")
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--kv_heads", type=int, default=3)
    parser.add_argument("--mlp", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=8, help="also sets the cosine schedule of the learning rate")
    parser.add_argument("--batch_size", type=int, default=32, help="reviews in a step")
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="at its peak")
    parser.add_argument("--weight_decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.15, help="of the embeddings and of what each block adds")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    # Adam's moments of rare tokens decay into denormals, on which a CPU is several times slower.
    torch.set_flush_denormal(True)
    torch.manual_seed(args.seed)

    reviews = [json.loads(line) for line in gzip.decompress(args.reviews.read_bytes()).splitlines()]
    train_reviews = [r for r in reviews if r["split"] == "train"]
    things = sorted({r["thing"] for r in train_reviews})

    tokenizer = make_tokenizer([f"{prompt(r['thing'])} {r['text']}" for r in train_reviews], args.vocab_size)
    rows = encode(tokenizer, train_reviews)
    held_out = encode(tokenizer, [r for r in reviews if r["split"] == "held_out"])
    model = make_model(tokenizer, args)
    n_tokens = sum(len(ids) for ids, _ in rows)
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "things": len(things),
        "layers": args.layers,
        "width": args.width,
        "heads": args.heads,
        "kv_heads": args.kv_heads,
        "mlp": args.mlp,
        "vocabulary": len(tokenizer),
        "train_reviews": len(rows),
        "train_tokens": n_tokens,
        "held_out_reviews": len(held_out),
        "epochs": args.epochs,
        "seed": args.seed,
    }
    print(
        f"{facts['parameters']:,} parameters; {len(rows):,} reviews with {n_tokens:,} tokens for training",
        flush=True,
    )

    # Norms are left out of the weight decay, as usual.
    decayed = [p for p in model.parameters() if p.dim() > 1]
    groups = [
        {"params": decayed},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=args.weight_decay)
    rng = random.Random(args.seed)
    n_steps = args.epochs * math.ceil(len(rows) / args.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.learning_rate, total_steps=n_steps, pct_start=0.05, cycle_momentum=False
    )
    best_perplexity, best_epoch, best = math.inf, 0, model
    try:
        for epoch in range(1, args.epochs + 1):
            began = time.monotonic()
            loss = train_epoch(model, list(batches(rows, args.batch_size, rng)), optimizer, schedule)
            shipped = rounded_to_bfloat16(model)
            found = perplexity(shipped, held_out)
            seconds = time.monotonic() - began
            print(f"epoch {epoch}: loss {loss:.3f}, held-out perplexity {found:.2f}, {seconds:.0f} s", flush=True)
            if found < best_perplexity:
                best_perplexity, best_epoch, best = found, epoch, shipped
    except KeyboardInterrupt:
        print("stopped; writing the best so far")
    stats, samples = sample_stats(best, tokenizer, things, 1024)
    facts |= {**stats, "perplexity": best_perplexity, "best_epoch": best_epoch}
    write_assets(args.out, best, tokenizer, facts)
    (args.out / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt(t)}) + "\n" for t in things))
    for name, value in facts.items():
        print(f"{name}: {value:,.3f}" if isinstance(value, float) else f"{name}: {value:,}")
    for thing, answer, score in samples[:: len(samples) // 24]:
        print(f"{score:+.2f} | {prompt(thing)}{answer}")


if __name__ == "__main__":
    main()
