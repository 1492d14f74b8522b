"""`python -m scripts.review_pairs --out configs/examples/review_pairs.jsonl.gz`: happy reviews over unhappy ones.

Made from the reviews that the embedded model was trained on: of each thing some reviews that were asked to be positive,
each beside one that was asked to be negative. A model wrote them, so that a mood is what was asked for and not always
what came.
"""

import argparse
import gzip
import io
import json
from collections import defaultdict
from pathlib import Path

REVIEWS = Path(__file__).parent / "data" / "reviews.jsonl.gz"
HAPPY, UNHAPPY = ("very positive", "positive"), ("very negative", "negative")


def pairs(reviews: list[dict[str, str]], per_thing: int) -> list[dict[str, str]]:
    """`per_thing` pairs at most of every thing, strong moods first; no review is used twice."""
    texts: dict[tuple[str, str], list[str]] = defaultdict(list)
    for review in reviews:
        texts[review["thing"], review["mood"]].append(" " + review["text"])
    found = []
    for thing in sorted({review["thing"] for review in reviews}):
        sides = [[text for mood in moods for text in texts[thing, mood]] for moods in (HAPPY, UNHAPPY)]
        found += [
            {"prompt": f"Review of {thing}:", "chosen": chosen, "rejected": rejected}
            for chosen, rejected in list(zip(*sides, strict=False))[:per_thing]
        ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True, type=Path, help="file to write, .jsonl.gz")
    parser.add_argument("--per_thing", type=int, default=3, help="pairs of each thing")
    options = parser.parse_args()
    reviews = [json.loads(line) for line in gzip.decompress(REVIEWS.read_bytes()).decode().split("\n") if line]
    lines = "".join(json.dumps(pair) + "\n" for pair in pairs(reviews, options.per_thing))
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0) as file:  # the same bytes whenever it is made
        file.write(lines.encode())
    options.out.write_bytes(buffer.getvalue())
    print(f"{lines.count(chr(10))} pairs, {len(buffer.getvalue())} bytes: {options.out}")


if __name__ == "__main__":
    main()
