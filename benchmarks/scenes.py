"""`python -m benchmarks.scenes --json FILE`: how often, and how early, the alarms see each failure, and how often none.

Every scene of `scene_runs` is provoked once for every seed, beside three healthy runs; each run's rows become a line of
FILE, and what is there already, of the same seed and settings, is not run again. The alarms are a function of the rows,
so `--judge` gives the tables of those seeds that FILE has without running anything. Thresholds were set on runs of seed
100.
"""

import argparse
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.recipes import machine
from benchmarks.scene_runs import RECIPES, SCENES, Row, Scene, config_of, healthy_of, run, settings_of
from ppo_jax import durable, jsonl
from ppo_jax.intervals import wilson_interval
from ppo_jax.monitor import alarms

Line = dict[str, Any]  # of FILE: name, seed, settings, rows
LASTING = 3  # rows in a row that are harm


def judge(name: str, seed: int, rows: Sequence[Row], patience: int) -> dict[str, Any]:
    """What the alarms say of a run, row by row as if it were going on, and when its harm began."""
    config = config_of(name, seed, patience=patience)
    heard = [alarm for end in range(1, len(rows) + 1) for alarm in alarms.raised(rows[:end], {}, config, {})]
    first = {scene: min(a.step for a in heard if a.scene == scene) for scene in {alarm.scene for alarm in heard}}
    found = {"name": name, "seed": seed, "iterations": len(rows), "heard": dict(sorted(first.items()))}
    scene = SCENES.get(name)
    if scene is None:
        return found
    right = [alarm.step for alarm in heard if alarm.scene == scene.expected and scene.cause in alarm.cause]
    return found | {"detected": min(right, default=None), "harm": harmed(scene, rows)}


def harmed(scene: Scene, rows: Sequence[Row]) -> int | None:
    """The first iteration of the first harm that lasts: one row of 16 answers is noise."""
    if scene.harm is None:
        return None
    bad = [scene.harm(row, rows[0]) for row in rows]
    return next((rows[i]["step"] for i in range(len(rows) - LASTING + 1) if all(bad[i : i + LASTING])), None)


def read(file: Path) -> list[Line]:
    return jsonl.read(file, name=str, seed=int, settings=dict, rows=list)


def asked(lines: Sequence[Line], names: Sequence[str], seeds: Sequence[int]) -> list[Line]:
    """Those of a file that are of these scenes and seeds, in the settings that they have now."""
    return [
        line
        for line in lines
        if line["seed"] in seeds
        and (line["name"] in names if line["name"] in SCENES else "healthy" in names)
        and line["settings"] == settings_of(line["name"], line["seed"])
    ]


def run_the_rest(file: Path, names: Sequence[str], seeds: Sequence[int]) -> None:
    """Append what is asked for and not there yet. A last line that was torn when the process was killed is cut off."""
    lines = read(file)
    if file.is_file():
        durable.write_text(file, "".join(map(jsonl.line, lines)))
    done = {(line["name"], line["seed"]) for line in asked(lines, names, seeds)}
    for seed in seeds:
        healthy = healthy_of(seed) if "healthy" in names else ()
        for name in (*(name for name in SCENES if name in names), *healthy):
            if (name, seed) not in done:
                rows = run(name, config_of(name, seed))
                with file.open("a") as lines_of_file:
                    lines_of_file.write(
                        jsonl.line({"name": name, "seed": seed, "settings": settings_of(name, seed), "rows": rows})
                    )


def rate(hits: int, of: int) -> str:
    low, high = wilson_interval(hits / of, of) if of else (0.0, 1.0)
    return f"{hits} of {of} ({low:.0%} to {high:.0%})"


def scene_table(judged: list[dict[str, Any]]) -> list[list[str]]:
    lines = []
    for name, scene in SCENES.items():
        runs = [found for found in judged if found["name"] == name]
        seen, harms = ([found[key] for found in runs if found[key] is not None] for key in ("detected", "harm"))
        leads = [x["harm"] - x["detected"] for x in runs if x["harm"] is not None and x["detected"] is not None]
        any_alarm = [min(found["heard"].values()) for found in runs if found["heard"]]
        others = Counter(alarm for found in runs for alarm in found["heard"] if alarm != scene.expected)
        lines.append(
            [
                name,
                scene.expected + (f": {scene.cause}" if scene.cause else ""),
                rate(len(seen), len(runs)),
                f"{median(seen):g}" if seen else "",
                f"{median(any_alarm):g}" if any_alarm else "",
                scene.harm_is,
                f"{median(harms):g} ({len(harms)} runs)" if harms else "" if scene.harm else "the last",
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
    "any alarm in",
    "harm",
    "in iteration",
    "lead",
    "also raised",
]


def healthy_table(judged: list[dict[str, Any]]) -> list[list[str]]:
    """Recipe by recipe, and all of them by their seeds: the three runs of a seed share prompts, noise and first row."""
    healthy = [found for found in judged if found["name"] not in SCENES]
    groups = {recipe: [found for found in healthy if found["name"] == recipe] for recipe in ("default", *RECIPES)}
    lines = []
    for name, runs in {**groups, "all": healthy}.items():
        false = [found for found in runs if found["heard"]]
        which = Counter(alarm for found in false for alarm in found["heard"])
        seeds, of = {found["seed"] for found in false}, {found["seed"] for found in runs}
        lines.append(
            [
                name,
                f"{len(false)} of {len(runs)}",
                rate(len(seeds), len(of)),
                ", ".join(f"{alarm} {count}" for alarm, count in which.most_common()),
            ]
        )
    return lines


HEALTHY_HEAD = ["healthy recipe", "runs with any alarm", "seeds with any alarm (95%)", "which"]


def summary(judged: list[dict[str, Any]]) -> str:
    """Over all scenes: how many are detected, and of those with a harm how many no later than it."""
    runs = [found for found in judged if found["name"] in SCENES]
    done = [found for found in runs if found["harm"] is not None]
    in_time = sum(found["detected"] is not None and found["detected"] <= found["harm"] for found in done)
    by_any = sum(min(found["heard"].values(), default=math.inf) <= found["harm"] for found in done)
    detected = sum(found["detected"] is not None for found in runs)
    return (
        f"{detected} of {len(runs)} runs of scenes are detected. In {in_time} of the {len(done)} with a harm the right "
        f"alarm comes no later than it, in {by_any} any alarm."
    )


def print_tables(judged: list[dict[str, Any]]) -> None:
    """As Markdown, for docs/failure-scenes.md."""
    for head, lines in ((SCENE_HEAD, scene_table(judged)), (HEALTHY_HEAD, healthy_table(judged))):
        print(f"\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
        for line in lines:
            print(f"| {' | '.join(line)} |")
    print(f"\n{summary(judged)}")


def seeds_of(text: str) -> list[int]:
    """`0-9` or `100,101,102`."""
    first, dash, last = text.partition("-")
    return list(range(int(first), int(last) + 1)) if dash else [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scenes", description=__doc__)
    parser.add_argument("--scenes", nargs="*", default=[*SCENES, "healthy"], help="names, and `healthy`")
    parser.add_argument("--seeds", type=seeds_of, default=seeds_of("0-9"), help="0-9, or 100,101")
    parser.add_argument("--json", type=Path, required=True, help="one line for each run; continued where it is there")
    parser.add_argument("--judge", action="store_true", help="run nothing, judge what FILE holds")
    parser.add_argument("--patience", type=int, default=3, help="alarms.patience that is judged with")
    parser.add_argument("--result", type=Path, help="write here what was judged of each run, and the machine")
    arguments = parser.parse_args()
    if not arguments.judge:
        run_the_rest(arguments.json, arguments.scenes, arguments.seeds)
    lines = asked(read(arguments.json), arguments.scenes, arguments.seeds)
    judged = [judge(line["name"], line["seed"], line["rows"], arguments.patience) for line in lines]
    print_tables(judged)
    if arguments.result is not None:
        arguments.result.write_text(
            json.dumps(machine() | {"patience": arguments.patience, "runs": judged}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
