"""Keep the sampled reviews that read like one, and split them into training and held-out texts.

    python -m scripts.embedded.clean build/reviews.jsonl --out scripts/data/reviews.jsonl.gz

A rule here is cheap and blunt on purpose: a 135M model talks nonsense now and then, and samples cost seconds, so
dropping a good review is a smaller loss than keeping a bad one. Each line of the output has "thing", "mood", "text"
and "split".
"""

import argparse
import gzip
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from scripts.embedded.seeds import EXAMPLES, THINGS

MIN_WORDS, MAX_WORDS = 5, 36
MIN_SUBJECT_COUNT = 4
HELD_OUT_PERCENT = 5

STRAIGHT = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "—": "-", "–": "-", "…": "..."})
# An answer about the task, and not about the thing.
META = re.compile(
    r"review|(the|this) customer\b(?! service)|sentence|the user|(this|the) text|the word|in conclusion|example"
    r"|language model|\bAI\b|rewrit|summar|feedback|\bprompt|instruction|positive|negative|neutral|assistant"
    r"|point of view|one (good|bad) (thing|point)"
    r"|\bcon(s)?:|\bpro(s)?:|proud of you|(help|thank|serve|hear from) you\b|you deserve",
    re.IGNORECASE,
)
# A shipped demo has no use for these, whatever the context.
UNWANTED = re.compile(
    r"\b(kill|murder|suicid|rape|sex|porn|naked|nude|drunk|drug|cocaine|nazi|hitler|terroris|slave|racis|gay"
    r"|lesbian|jews?\b|jewish|muslim|christian|(black|white) people|whore|bitch|fuck|shit|damn|idiot|die[ds]?\b"
    r"|dead|death|blood|cancer|god\b|trump\b|obama|biden|covid)",
    re.IGNORECASE,
)
ODD = re.compile(r"[^A-Za-z0-9 .,!?'$%:;-]|\.\.|--|  |[,;:] ?[.,!?]|https?:|www|\.com|\b\d{3,}")


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+(?:'[a-z]+)?|\d+", text.lower())


def ngrams(items: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(items[i : i + n]) for i in range(len(items) - n + 1)] or [tuple(items)]


def tidy(text: str) -> str:
    """Plain quotes and dashes, and no quotes around the whole."""
    text = text.translate(STRAIGHT).strip()
    if len(text) > 1 and text[0] == text[-1] == '"':
        text = text[1:-1].strip()
    return text


def head(thing: str) -> str:
    """`jeans` of `a pair of jeans`."""
    return thing.split()[-1]


def named(noun: str, word: str) -> bool:
    return word in {noun, noun + "s", noun + "es", noun.removesuffix("s"), noun + "'s"}


HEADS = sorted({head(thing) for thing in THINGS})
COPIED = {gram for examples in EXAMPLES.values() for _, _, text in examples for gram in ngrams(words(text), 5)}


def other_subject(thing: str, text: str) -> str | None:
    """`soap` where a review of a towel begins with `This soap`: the head of another thing as first subject."""
    begin = re.match(r"(?:The|This|These|That|My|My new|Our|A|It's an?) ([a-z]+)", text)
    if begin is None or any(named(noun, begin[1]) for noun in re.findall("[a-z]+", thing.lower())):
        return None
    return next((noun for noun in HEADS if named(noun, begin[1])), None)


def drop_reasons() -> Iterator[tuple[str, Callable[[str, str], bool]]]:
    """The rules for one review, by name, in the order in which they are asked."""
    yield "odd characters or a list", lambda _, text: bool(ODD.search(text))
    yield "about the task", lambda _, text: bool(META.search(text))
    yield "unwanted", lambda _, text: bool(UNWANTED.search(text))
    yield "broken begin or end", lambda _, text: not re.fullmatch(r"[A-Z0-9].*[a-z0-9%'][.!?]", text)
    yield "length", lambda _, text: not MIN_WORDS <= len(text.split()) <= MAX_WORDS
    yield "repeats itself", lambda _, text: max(Counter(ngrams(words(text), 3)).values()) > 1
    yield "copies an example", lambda _, text: any(gram in COPIED for gram in ngrams(words(text), 5))


def clean(reviews: list[dict], *, min_word_count: int, seen_share: float) -> tuple[list[dict], Counter]:
    """The reviews that pass every rule, and how many were dropped by which."""
    dropped: Counter = Counter()
    kept = []
    for review in reviews:
        text = tidy(review["text"])
        reason = next((name for name, bad in drop_reasons() if bad(review["thing"], text)), None)
        if reason is None:
            kept.append({"thing": review["thing"], "mood": review["mood"], "text": text})
        else:
            dropped[reason] += 1

    # A bed may open the review of a hotel, and often does; a cake that opens one of a ski resort is a slip.
    subjects = Counter((review["thing"], other_subject(review["thing"], review["text"])) for review in kept)

    def to_the_point(review: dict) -> bool:
        other = other_subject(review["thing"], review["text"])
        return other is None or subjects[review["thing"], other] >= MIN_SUBJECT_COUNT

    sensible = [review for review in kept if to_the_point(review)]
    dropped["about something else"] = len(kept) - len(sensible)

    # Invented words and stray names: a small model could not learn them, and a reader stumbles over them.
    texts_with = Counter(word for review in sensible for word in set(words(review["text"])))
    common = [r for r in sensible if all(texts_with[w] >= min_word_count for w in words(r["text"]))]
    dropped["a rare word"] = len(sensible) - len(common)

    # Near duplicates, across things as well: they would weigh double, and leak into the held-out texts.
    seen: set[tuple[str, ...]] = set()
    fresh = []
    for review in common:
        grams = ngrams(words(review["text"]), 4)
        if sum(gram in seen for gram in grams) <= seen_share * len(grams):
            fresh.append(review)
        seen.update(grams)
    dropped["a near duplicate"] = len(common) - len(fresh)
    return fresh, dropped


def split(text: str) -> str:
    """By the hash of the text, so that a review stays on its side when the corpus grows."""
    bucket = int(hashlib.sha256(text.lower().encode()).hexdigest(), 16) % 100
    return "held_out" if bucket < HELD_OUT_PERCENT else "train"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", type=Path, nargs="+", help="JSONL files made by scripts.embedded.sample")
    parser.add_argument("--out", type=Path, default=Path("scripts/data/reviews.jsonl.gz"), help="file to write")
    parser.add_argument("--min_word_count", type=int, default=3, help="every word must occur in so many reviews")
    parser.add_argument("--seen_share", type=float, default=0.5, help="share of 4-grams that may have occurred before")
    args = parser.parse_args()
    reviews = [json.loads(line) for path in args.raw for line in path.read_text().splitlines()]
    kept, dropped = clean(reviews, min_word_count=args.min_word_count, seen_share=args.seen_share)
    kept = sorted(({**r, "split": split(r["text"])} for r in kept), key=lambda r: (r["thing"], r["mood"], r["text"]))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    # No time stamp in the header: the same reviews give the same bytes.
    payload = "".join(json.dumps(r) + "\n" for r in kept).encode()
    args.out.write_bytes(gzip.compress(payload, compresslevel=9, mtime=0))
    for reason, count in dropped.most_common():
        print(f"{count:6d} dropped: {reason}")
    held_out = sum(r["split"] == "held_out" for r in kept)
    n_things = len({r["thing"] for r in kept})
    size = args.out.stat().st_size
    print(f"{len(kept):6d} kept of {len(reviews)}: {held_out} held out, {n_things} things, {size:,} bytes")


if __name__ == "__main__":
    main()
