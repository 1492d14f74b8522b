"""`python -m benchmarks.scenes --json FILE`: how often, and how early, the alarms see each failure, and how often none.

Every scene of `scene_runs` is provoked once for every seed, beside three healthy runs; each run's rows become a line of
FILE, and what is there already is not run again. The alarms are a function of the rows, so `--judge` gives the table of
whatever is in FILE without running anything. Thresholds were set on runs of seed 100.
"""

import argparse
import json
import platform
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.scene_runs import RECIPES, SCENES, Row, config_of, healthy_of, run
from ppo_jax.intervals import wilson_interval
from ppo_jax.monitor import alarms


def judge(name: str, seed: int, rows: Sequence[Row]) -> dict[str, Any]:
    """What the alarms say of a run, row by row as if it were going on, and when its harm is done."""
    config = config_of(name, seed, len(rows))
    heard = [alarm for end in range(1, len(rows) + 1) for alarm in alarms.raised(rows[:end], config, {})]
    first = {scene: min(a.step for a in heard if a.scene == scene) for scene in {alarm.scene for alarm in heard}}
    scene = SCENES.get(name)
    if scene is None:
        return {"name": name, "seed": seed, "heard": first}
    right = [alarm.step for alarm in heard if alarm.scene == scene.expected and scene.cause in alarm.cause]
    harmed = [row["step"] for row in rows if scene.harm is not None and scene.harm(row, rows[0])]
    return {
        "name": name,
        "seed": seed,
        "heard": first,
        "detected": min(right, default=None),
        "harm": min(harmed, default=None),
    }


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def rate(hits: int, of: int) -> str:
    low, high = wilson_interval(hits / max(of, 1), of)
    return f"{hits} of {of} ({low:.0%} to {high:.0%})"


def scene_table(judged: list[dict[str, Any]]) -> list[list[str]]:
    lines = []
    for name, scene in SCENES.items():
        runs = [found for found in judged if found["name"] == name]
        seen, harmed = ([found[key] for found in runs if found[key] is not None] for key in ("detected", "harm"))
        leads = [x["harm"] - x["detected"] for x in runs if x["harm"] is not None and x["detected"] is not None]
        others = Counter(alarm for found in runs for alarm in found["heard"] if alarm != scene.expected)
        lines.append(
            [
                name,
                scene.expected + (f": {scene.cause}" if scene.cause else ""),
                rate(len(seen), len(runs)),
                f"{median(seen):g}" if seen else "",
                scene.harm_is,
                f"{median(harmed):g} ({len(harmed)} runs)" if harmed else "" if scene.harm else "the last",
                f"{min(leads):+d} to {max(leads):+d}, median {median(leads):+g}" if leads else "",
                ", ".join(f"{alarm} {count}" for alarm, count in others.most_common()),
            ]
        )
    return lines


SCENE_HEAD = [
    "scene",
    "expected alarm",
    "detected (95%)",
    "in iteration",
    "harm",
    "in iteration",
    "lead",
    "also raised",
]


def healthy_table(judged: list[dict[str, Any]]) -> list[list[str]]:
    groups = [[recipe] for recipe in ("default", *RECIPES)] + [["default", *RECIPES]]
    lines = []
    for group in groups:
        runs = [found for found in judged if found["name"] in group]
        false = [found for found in runs if found["heard"]]
        which = Counter(alarm for found in false for alarm in found["heard"])
        name = group[0] if len(group) == 1 else "all"
        lines.append(
            [name, rate(len(false), len(runs)), ", ".join(f"{alarm} {count}" for alarm, count in which.items())]
        )
    return lines


HEALTHY_HEAD = ["healthy recipe", "runs with any alarm (95%)", "which"]


def print_tables(judged: list[dict[str, Any]]) -> None:
    """As Markdown, for docs/failure-scenes.md."""
    for head, lines in ((SCENE_HEAD, scene_table(judged)), (HEALTHY_HEAD, healthy_table(judged))):
        print(f"\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
        for line in lines:
            print(f"| {' | '.join(line)} |")


def seeds_of(text: str) -> list[int]:
    """`0-9` or `100,101,102`."""
    first, dash, last = text.partition("-")
    return list(range(int(first), int(last) + 1)) if dash else [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scenes", description=__doc__)
    parser.add_argument("--scenes", nargs="*", default=[*SCENES, "healthy"], help="names, and `healthy`")
    parser.add_argument("--seeds", type=seeds_of, default=seeds_of("0-9"), help="0-9, or 100,101")
    parser.add_argument("--iterations", type=int, default=12)
    parser.add_argument("--json", type=Path, required=True, help="one line for each run; continued where it is there")
    parser.add_argument("--judge", action="store_true", help="run nothing, judge what FILE holds")
    arguments = parser.parse_args()
    done = {(found["name"], found["seed"]) for found in read(arguments.json)}
    for seed in [] if arguments.judge else arguments.seeds:
        names = [name for name in SCENES if name in arguments.scenes]
        for name in [*names, *(healthy_of(seed) if "healthy" in arguments.scenes else ())]:
            if (name, seed) not in done:
                line = {"name": name, "seed": seed, "rows": run(name, seed, arguments.iterations)}
                with arguments.json.open("a") as file:
                    file.write(json.dumps(line) + "\n")
    print(platform.platform())
    print_tables([judge(found["name"], found["seed"], found["rows"]) for found in read(arguments.json)])


if __name__ == "__main__":
    main()
