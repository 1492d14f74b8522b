"""Sample short customer reviews from SmolLM2-135M-Instruct and append them to a JSONL file.

    python -m scripts.embedded.sample --model models/SmolLM2-135M-Instruct --out build/reviews.jsonl

Each line has "thing", "mood" (what was asked for), "text" (the answer) and "batch" (where it came from). Stop it at
any time and start it again: a batch is a function of the seed and its number, and the last line of the file says which
number comes next.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoTokenizer,
    DynamicCache,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)
from transformers.masking_utils import eager_mask

from scripts.embedded.seeds import EXAMPLES, HINTS, LENGTHS, MOODS, THINGS

SYSTEM = "You write short customer reviews in simple words."
MAX_NEW_TOKENS = 56


def shared_prefix_attention(module, query, key, value, attention_mask, scaling, prefix=None, **_):
    """Grouped-query attention over the row's own keys and, where given, over one prefix that all rows share.

    The stock attention copies the keys once per head and the prefix once per row: on a CPU, most of a step.
    """
    B, H, Q, D = query.shape
    G = key.shape[1]
    R = H // G * Q
    query = query.reshape(B, G, R, D) * scaling
    scores = (query @ key.transpose(2, 3)).view(B, G, H // G, Q, -1) + attention_mask[:, :, None]
    scores = scores.view(B, G, R, -1)
    if prefix is None:
        return (scores.softmax(-1) @ value).view(B, H, Q, D).transpose(1, 2), None
    keys, values = prefix[module.layer_idx]
    flat = query.transpose(0, 1).reshape(G, B * R, D)
    prefix_scores = (flat @ keys[0].transpose(1, 2)).view(G, B, R, -1).transpose(0, 1)
    weights = torch.cat([prefix_scores, scores], dim=-1).softmax(-1)
    P = prefix_scores.shape[-1]
    out = weights[..., P:] @ value
    shared = weights[..., :P].transpose(0, 1).reshape(G, B * R, P) @ values[0]
    out = out + shared.view(G, B, R, D).transpose(0, 1)
    return out.reshape(B, H, Q, D).transpose(1, 2), None


AttentionInterface.register("shared_prefix", shared_prefix_attention)
AttentionMaskInterface.register("shared_prefix", eager_mask)


def request(thing: str, mood: str, length: str) -> str:
    return (
        f"Write a {mood} customer review of {thing}, {HINTS[mood]}, in {length}. "
        "Use simple words. Answer with the review only."
    )


def batch_chats(rng: random.Random, mood: str, n_things: int) -> tuple[list[dict], list[tuple[str, list[dict]]]]:
    """The turns that a batch shares, and for each of its things the last turn."""
    shared = [{"role": "system", "content": SYSTEM}]
    for thing, length, text in rng.sample(EXAMPLES[mood], 3):
        shared.append({"role": "user", "content": request(thing, mood, length)})
        shared.append({"role": "assistant", "content": text})
    things = rng.sample(THINGS, n_things)
    return shared, [(t, {"role": "user", "content": request(t, mood, rng.choice(LENGTHS))}) for t in things]


@torch.inference_mode()
def answers(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    shared: list[dict],
    turns: list[dict],
    *,
    per_turn: int,
    temperature: float,
    generator: torch.Generator,
) -> list[tuple[int, str]]:
    """Sampled answers that ended by themselves and hold one line, as (index of the turn, text)."""
    prefix_text = tokenizer.apply_chat_template(shared, tokenize=False)
    texts = [
        tokenizer.apply_chat_template([*shared, turn], tokenize=False, add_generation_prompt=True)[len(prefix_text) :]
        for turn in turns
    ]
    prefix_ids = tokenizer(prefix_text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    prefix_cache = DynamicCache(config=model.config)
    model(prefix_ids, past_key_values=prefix_cache, logits_to_keep=1)
    prefix = [(layer.keys, layer.values) for layer in prefix_cache.layers]

    last_turns = tokenizer(texts, add_special_tokens=False, return_tensors="pt", padding=True, padding_side="left")
    mask = last_turns["attention_mask"]
    position = prefix_ids.shape[1] + (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    logits = model(
        last_turns["input_ids"],
        attention_mask=mask,
        position_ids=position,
        past_key_values=cache,
        prefix=prefix,
        logits_to_keep=1,
    ).logits
    cache.batch_repeat_interleave(per_turn)
    logits, mask = logits.repeat_interleave(per_turn, 0), mask.repeat_interleave(per_turn, 0)
    position = position[:, -1:].repeat_interleave(per_turn, 0)
    turn_of = torch.arange(len(turns)).repeat_interleave(per_turn)
    written = torch.zeros(len(turn_of), 0, dtype=torch.long)
    # "Ċ" is how byte-level vocabularies spell a line break.
    newline = torch.tensor(["Ċ" in t for t in tokenizer.convert_ids_to_tokens(range(model.config.vocab_size))])
    done = []
    for _ in range(MAX_NEW_TOKENS):
        cdf = (logits[:, -1] / temperature).softmax(-1).cumsum(-1)
        uniforms = torch.rand(len(cdf), 1, generator=generator) * cdf[:, -1:]
        token = torch.searchsorted(cdf, uniforms, right=True).clamp(max=cdf.shape[1] - 1)
        ended = token[:, 0] == tokenizer.eos_token_id
        for row in ended.nonzero()[:, 0].tolist():
            done.append((int(turn_of[row]), tokenizer.decode(written[row]).strip()))
        # A finished row leaves the batch, and so does one that begins a second line: `clean` would drop it.
        going = (~ended & ~newline[token[:, 0]]).nonzero()[:, 0]
        if len(going) == 0:
            break
        if len(going) < len(token):
            cache.batch_select_indices(going)
        turn_of, token, position = turn_of[going], token[going], position[going] + 1
        written = torch.cat([written[going], token], 1)
        mask = torch.cat([mask[going], torch.ones_like(token)], 1)
        logits = model(token, attention_mask=mask, position_ids=position, past_key_values=cache, prefix=prefix).logits
    return done


def next_batch(path: Path) -> int:
    """The number after the last whole batch in the file."""
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1])["batch"] + 1 if lines else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="directory made by scripts.fetch_smollm2")
    parser.add_argument("--out", type=Path, required=True, help="JSONL file to append to")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after the batch that passes this time")
    parser.add_argument("--batches", type=int, default=53, help="stop when the file holds this many")
    parser.add_argument("--things", type=int, default=32, help="things asked about in one batch")
    parser.add_argument("--per_thing", type=int, default=8, help="answers for each of them")
    parser.add_argument("--temperature", type=float, default=0.75, help="sampling temperature (top-p is 1)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0, help="with the batch number, decides what is sampled")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = LlamaForCausalLM.from_pretrained(args.model, attn_implementation="shared_prefix").eval()
    args.out.parent.mkdir(parents=True, exist_ok=True)

    start = time.monotonic()
    batch = next_batch(args.out)
    while batch < args.batches and time.monotonic() - start < 60 * args.minutes:
        began = time.monotonic()
        mood = MOODS[batch % len(MOODS)]
        shared, asked = batch_chats(random.Random(f"{args.seed}/{batch}"), mood, args.things)
        generator = torch.Generator().manual_seed(args.seed * 1_000_000 + batch)
        turns = [turn for _, turn in asked]
        done = answers(
            model, tokenizer, shared, turns,
            per_turn=args.per_thing, temperature=args.temperature, generator=generator,
        )  # fmt: skip
        lines = [json.dumps({"thing": asked[i][0], "mood": mood, "text": text, "batch": batch}) for i, text in done]
        with args.out.open("a") as file:
            file.write("".join(line + "\n" for line in lines))
        n_tokens = sum(len(tokenizer(text)["input_ids"]) for _, text in done)
        seconds = time.monotonic() - began
        print(f"batch {batch}: {len(done)} answers, {n_tokens / seconds:.0f} tokens/s kept, {mood}", flush=True)
        batch += 1


if __name__ == "__main__":
    main()
