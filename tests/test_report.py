"""The report: whole without a network, harmless whatever a model wrote, and right about the numbers it was given."""

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ppo_jax import ratings
from ppo_jax.config import Config
from ppo_jax.intervals import wilson_interval
from ppo_jax.report import curves as charts
from ppo_jax.report.__main__ import main
from ppo_jax.report.drawing import Band, Chart, Line, Mark, Rule, draw, ticks
from ppo_jax.report.page import changed_settings, fixed_prompts, kept_answers, page
from ppo_jax.report.runs import read_curves, read_run
from ppo_jax.report.verdict import verdict

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\x00\x1b[31m\ud83d\u2028\"'</style>{{ 7 * 7 }}&lt;"


def metrics(step, **changes):
    """An iteration of a run in which nothing is wrong."""
    return {
        "step": step,
        "score/mean": 0.2 + 0.02 * step,
        "score/std": 0.3,
        "reward/mean": 0.1,
        "kl/seq_nats": 4 * step / (step + 5),
        "kl/token_nats": 0.1 * step / (step + 5),
        "response/len_mean_tokens": 20.0,
        "response/truncated_frac": 0.02,
        "policy/entropy_nats": 2.5,
        "policy/clip_frac": 0.01,
        **{f"logprob/{name}": -float(i) for i, name in enumerate(["q95", "q75", "q50", "q25", "q05"])},
        "time/iteration_s": 2.0,
        "update/skipped_steps": 0.0,
    } | {name.replace("__", "/"): value for name, value in changes.items()}


def write(directory, rows, *, samples=(), answers=(), alarms=(), config=None):
    directory.mkdir(parents=True, exist_ok=True)
    files = {"metrics": rows, "samples": samples, "answers": answers, "alarms": alarms}
    for name, content in files.items():
        if content:
            (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    sections = Config().model_dump(mode="json") if config is None else config
    (directory / "config.yaml").write_text(yaml.safe_dump(sections))
    (directory / "versions.json").write_text(json.dumps({"python": "3.11.0", "devices": ["cpu"]}))
    return directory


def sample(step, text, prompt="a prompt"):
    return {"step": step, "prompt": prompt, "answer": text, "score": 0.5, "kl_nats": 1.25, "tokens": 7}


def html_of(*runs):
    return page(read_curves([str(run) for run in runs]))


class Read(HTMLParser):
    """Elements with their attributes, and the text within each kind of element."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.elements, self.texts, self._open = [], {}, []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        for tag in set(self._open):
            self.texts[tag] = self.texts.get(tag, "") + data


@pytest.fixture
def hostile(tmp_path):
    """A run whose every text is hostile."""
    return write(
        tmp_path / "run<b>&\"'",
        [metrics(step) for step in range(12)],
        samples=[sample(step, f"{HOSTILE} {step}", HOSTILE) for step in (0, 5, 10, 12)],
        answers=[sample(0, HOSTILE, HOSTILE) | {"why": ["best", HOSTILE]}],
        alarms=[
            {"step": 3, "scene": HOSTILE, "level": HOSTILE, "numbers": {}, "message": HOSTILE, "cause": HOSTILE}
            | {"advice": HOSTILE, "checkpoint": HOSTILE}
        ],
        config={"run": {"dir": HOSTILE, HOSTILE: HOSTILE}},
    )


def test_no_text_of_a_run_becomes_an_element_or_an_attribute_of_the_page(hostile):
    html = html_of(hostile)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u2028\ud800-\udfff]", html)
    found = Read(html)
    tags = [tag for tag, _ in found.elements]
    assert (tags.count("script"), tags.count("style"), tags.count("img")) == (1, 1, 0)
    assert "alert(1)" not in found.texts["script"]
    assert not any(name.startswith("on") for _, attributes in found.elements for name in attributes)
    shown = found.texts["body"]
    assert "<script>alert(1)</script>" in shown
    assert "{{ 7 * 7 }}&lt;" in shown
    assert "␀␛[31m⟨U+D83D⟩⟨U+2028⟩" in shown


def test_the_page_needs_no_other_file_and_lets_only_its_own_script_run(hostile):
    found = Read(html_of(hostile))
    links = [value for _, a in found.elements for name, value in a.items() if name in ("src", "href", "srcset", "data")]
    assert links
    assert all(link.startswith("#") for link in links)
    assert not re.search(r"url\(|@import", found.texts["style"])
    (policy,) = [a["content"] for tag, a in found.elements if a.get("http-equiv") == "Content-Security-Policy"]
    digest = base64.b64encode(hashlib.sha256(found.texts["script"].encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def not_finite(step):
    return metrics(step, **({"kl__seq_nats": math.nan, "score__mean": math.inf} if step == 2 else {}))


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ([], {}),
        ([metrics(0)], {}),
        ([metrics(step) for step in range(5)], {"samples": [sample(0, "one")]}),
        ([not_finite(step) for step in range(5)], {}),
        ([{"step": 0, "kl/seq_nats": math.nan}, {"step": 1, "score/mean": None}], {}),
        ([{"step": 3}, {"step": 7}], {"config": {}}),
        ([metrics(step) for step in range(5)], {"samples": [{"step": 0, "prompt": "p", "answer": "", "score": 0.0}]}),
        ([metrics(0)], {"alarms": [{"step": 0}]}),
    ],
    ids=["begun", "one", "early", "not-finite", "all-nan", "bare", "old", "alarm"],
)
def test_a_run_of_which_little_is_there_has_a_page(tmp_path, rows, parts):
    run = write(tmp_path / "run", rows, **parts)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "kl/')
    before = {path: path.read_bytes() for path in run.rglob("*")}
    html = html_of(run)
    assert "nan" not in re.sub(r'data-readout="[^"]*"', "", html)
    assert Read(html).texts["h1"] == "run"
    assert {path: path.read_bytes() for path in run.rglob("*")} == before


def test_a_run_without_config_and_versions_has_a_page(tmp_path):
    run = write(tmp_path / "run", [metrics(step) for step in range(5)])
    for name in ("config.yaml", "versions.json"):
        (run / name).unlink()
    assert "5 iterations" in html_of(run)


# --------------------------------------------------------------------------------------------------------- verdict


def said(tmp_path, rows, **parts):
    return verdict(read_run(write(tmp_path / "run", rows, **parts)))


def test_a_healthy_run_has_nothing_to_worry_about_and_its_numbers_are_in_the_verdict(tmp_path):
    found = said(tmp_path, [metrics(step) for step in range(30)])
    assert (found.level, found.worries) == ("fine", [])
    assert "rose from 0.24 to 0.74 over 30 iterations" in found.headline
    last = [4 * step / (step + 5) for step in range(25, 30)]
    assert f"{sum(last) / 5:.1f} nats" in found.headline
    assert f"at {last[-1]:.1f}" in found.headline


@pytest.mark.parametrize(
    ("change", "level", "words"),
    [
        (lambda k: {"kl__token_nats": 0.02 * k}, "watch", "far from the SFT model"),
        (lambda k: {"kl__token_nats": 0.1 * k}, "act", "far from the SFT model"),
        (lambda k: {"kl__seq_nats": 0.2 * k}, "watch", "KL still rises: 2.4 nats half-way, 5.4 at the end"),
        (lambda k: {"kl__seq_nats": 0.001, "score__mean": 0.5}, "watch", "hardly moves"),
        (lambda k: {"response__len_mean_tokens": 40.0 - k}, "watch", "shorter, from 38 to 13 tokens"),
        (lambda k: {"response__len_mean_tokens": 10.0 + k}, "watch", "longer, from 12 to 37 tokens"),
        (lambda k: {"response__truncated_frac": k / 30}, "watch", "90% of the answers are cut off"),
        (lambda k: {"policy__entropy_nats": 2.5 - 0.08 * k}, "watch", "Entropy fell from 2.34 to 0.34"),
        (lambda k: {"policy__clip_frac": 0.4}, "watch", "40% of the tokens are clipped"),
        (lambda k: {"loss__policy": math.nan} if k == 7 else {}, "act", "iteration 7 are not finite"),
        (lambda k: {"update__skipped_steps": 1.0} if k > 20 else {}, "act", "9 iterations from 21 to 29"),
        (lambda k: {"evaluation__score_mean": 0.3} if k % 10 == 0 else {}, "watch", "0.00 on held-out prompts"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_failure_has_its_sentence_and_no_other(tmp_path, change, level, words):
    found = said(tmp_path, [metrics(step, **change(step)) for step in range(30)])
    assert found.level == level
    assert len(found.worries) == 1
    assert words in found.worries[0]


@pytest.mark.parametrize("every", [15, 10, 6, 5, 3])
def test_held_out_prompts_that_rise_as_the_others_are_no_worry_however_few_there_are(tmp_path, every):
    rows = [metrics(step) for step in range(30)]
    rows = [row | ({"evaluation/score_mean": row["score/mean"]} if row["step"] % every == 0 else {}) for row in rows]
    assert said(tmp_path, rows).worries == []


def test_a_change_of_the_score_within_its_noise_is_none(tmp_path):
    noisy = [metrics(step, score__mean=0.5 + 0.001 * step, score__std=1.0) for step in range(30)]
    assert (
        "did not clearly change over 30 iterations: 0.50 at the start, 0.53 at the end"
        in said(tmp_path, noisy).headline
    )
    quiet = [row | {"score/std": 0.01} for row in noisy]
    assert "rose from 0.50 to 0.53" in said(tmp_path, quiet).headline


def test_a_budget_that_is_passed_and_an_alarm_are_in_the_verdict(tmp_path):
    config = {"run": {"max_seq_kl_nats": 3.0, "iterations": 30}, "rollout": {"batch_size": 64}}
    alarms = [{"step": step, "scene": "template sentences", "level": "stop"} for step in (4, 9)]
    # Such a run ends at the first row above its budget.
    rows = [metrics(step, kl__seq_nats=2.5) for step in range(19)] + [metrics(19, kl__seq_nats=3.01)]
    found = said(tmp_path, rows, config=config, alarms=alarms)
    assert found.level == "act"
    assert found.worries[0].startswith("The KL is above its budget of 3 nats")
    assert found.worries[1] == "Alarm, template sentences: iterations 4 and 9."
    for level, expected in (("warn", "watch"), ("act", "act"), ("stop", "act")):
        alarms = [{"step": 4, "scene": "template sentences", "level": level}]
        assert said(tmp_path, [metrics(step) for step in range(30)], alarms=alarms).level == expected


# ---------------------------------------------------------------------------------------------------------- charts


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 9))
def test_ticks_are_few_round_and_within_their_range(low, width, count):
    found = ticks(low, low + width, count)
    assert len(found) <= count + 1
    step = found[1] - found[0] if len(found) > 1 else None
    slack = 1e-6 * width
    assert all(low - slack <= tick <= low + width + slack for tick in found)
    if step is not None:
        assert round(step / 10 ** math.floor(math.log10(step * (1 + 1e-9))), 3) in (1, 2, 5)


def points_of(path):
    return [tuple(map(float, pair)) for pair in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", path)]


def test_a_line_spans_its_chart_and_rises_with_its_values():
    drawn = draw(Chart("t", "u", [Line("a", [(0, 0.0), (5, 1.0), (10, 4.0)], 0)], from_zero=True), (0, 10))
    ((path, style, color),) = drawn.paths
    assert (style, color) == ("line", 0)
    (x0, y0), (x1, y1), (x2, y2) = points_of(path)
    assert (x0, x1, x2) == (0, 500, 1000)
    assert y0 == 1000
    assert (y0 - y1) / (y0 - y2) == pytest.approx(1 / 4, abs=1e-3)
    assert 0 < y2 < 100
    assert {label: 100 - position for position, label in drawn.y_ticks}["4"] == pytest.approx(100 - y2 / 10, abs=0.1)
    assert [label for _, label in drawn.x_ticks] == ["0", "2", "4", "6", "8", "10"]


def test_what_is_not_finite_leaves_a_gap_and_a_lone_point_is_a_dot():
    values = [(0, 1.0), (1, 2.0), (2, math.nan), (3, 1.0), (4, math.inf), (5, 2.0), (6, 1.0)]
    ((path, *_),) = draw(Chart("t", "u", [Line("a", values, 0)]), (0, 6)).paths
    assert re.sub(r"[\d. ]+", "", path) == "MLMhML"
    band = [(step, value - 1, value + 1) for step, value in values]
    ((path, *_),) = draw(Chart("t", "u", [], [Band(band, 0)]), (0, 6)).paths
    assert path.count("Z") == 2
    assert "nan" not in path
    assert draw(Chart("t", "u", [Line("a", [(0, math.nan)], 0)]), (0, 1)).paths == []


def test_marks_and_rules_stand_where_their_numbers_are():
    chart = Chart(
        "t",
        "u",
        [Line("a", [(0, 0.0), (10, 4.0)], 0)],
        rules=[Rule("target", 6.0), Rule("budget", 100.0)],
        marks=[Mark(4, "warn", "here"), Mark(11, "act", "not yet")],
        from_zero=True,
    )
    drawn = draw(chart, (0, 10))
    assert [(position, mark.text) for position, mark in drawn.marks] == [(40, "here")]
    ((position, label),) = drawn.rules  # a budget far above the curve does not flatten it
    assert label == "target"
    assert 0 < position < 10


def test_alarms_stand_at_their_iterations_in_every_main_chart(tmp_path):
    alarms = [
        {"step": 2, "scene": "shrinking", "level": "act", "message": "answers shrink"},
        {"step": 8, "level": "stop"},
    ]
    curves = read_curves([str(write(tmp_path / "run", [metrics(step) for step in range(9)], alarms=alarms))])
    drawn = charts.main_charts(curves)
    assert [chart.chart.title.split()[0] for chart in drawn] == ["KL", "Score", "Length", "Entropy", "Log-probs"]
    for chart in drawn:
        assert [(position, mark.level) for position, mark in chart.marks] == [(25, "act"), (100, "stop")]
    assert Read(page(curves)).texts["ul"].count("answers shrink") == 1


def test_seeds_of_a_recipe_are_their_mean_with_a_band_over_the_iterations_that_all_have(tmp_path):
    for seed, (factor, count) in enumerate([(1.0, 6), (3.0, 5)]):
        rows = [metrics(step, kl__seq_nats=factor * step) for step in range(count)]
        write(tmp_path / f"seed_{seed}", rows)
    (curve,) = read_curves([f"recipe={tmp_path / 'seed_0'},{tmp_path / 'seed_1'}"])
    assert curve.label == "recipe"
    assert curve.points("kl/seq_nats") == [(step, 2.0 * step, step, 3.0 * step) for step in range(5)]
    kl = charts.main_charts([curve])[0]
    assert [style for _, style, _ in kl.paths] == ["band", "line"]


def test_every_run_of_an_overlay_has_its_colour_its_verdict_and_its_row(tmp_path):
    runs = [write(tmp_path / name, [metrics(step) for step in range(6)], samples=[sample(0, "x")]) for name in "abc"]
    html = html_of(*runs)
    kl = charts.main_charts(read_curves(list(map(str, runs))))[0]
    assert [color for _, _, color in kl.paths] == [0, 1, 2]
    assert html.count('class="verdict ') == 3
    assert Read(html).texts["table"].count("6 of 30 iterations") == 3


def test_a_metric_that_is_not_there_has_no_chart_and_one_that_is_has(tmp_path):
    run = write(tmp_path / "run", [metrics(step, evaluation__win_rate=0.5) for step in range(6)])
    titles = [drawn.chart.title for drawn in charts.other_charts(read_curves([str(run)]))]
    assert "Held-out answers that beat the SFT model's" in titles
    assert "Gradient norm" not in titles


# ---------------------------------------------------------------------------------------------------- texts, tables


def test_fixed_prompts_show_what_is_gone_since_sft_and_what_is_new():
    texts = {0: "the room was dirty", 10: "the room was old", 20: "the bed was old", 30: "the room was lovely"}
    (prompt,) = fixed_prompts([sample(step, text) for step, text in texts.items()])
    titles = [answer.title for answer in prompt.answers]
    assert titles == ["SFT, before any update", "previous, after 20 iterations", "now, after 30 iterations"]
    marked = [[text for text, changed in answer.pieces if changed] for answer in prompt.answers]
    assert marked == [["dirty"], ["bed", "old"], ["lovely"]]
    assert prompt.answers[2].numbers == "score +0.50 · KL 1.25 nats · 7 tokens"
    assert [answer.title for answer in prompt.between] == ["after 10 iterations"]


def test_kept_answers_of_a_long_run_are_of_its_newest_its_oldest_and_some_between():
    rows = [sample(step, f"answer {step}") | {"why": ["best", "longest"]} for step in range(0, 1000, 10)]
    shown = kept_answers(rows)
    steps = [step for step, _ in shown]
    assert (steps[0], steps[-1], len(steps)) == (990, 0, 6)
    assert steps == sorted(set(steps), reverse=True)
    assert shown[0][1][0].title == "best, longest"
    assert kept_answers([]) == []
    assert [step for step, _ in kept_answers(rows[:1])] == [0]


def test_settings_that_differ_between_runs_come_before_those_that_differ_from_the_default_alone(tmp_path):
    sections = [Config().model_dump(mode="json") for _ in range(2)]
    for seed, section in enumerate(sections):
        section["run"] |= {"iterations": 50, "dir": str(seed)}
        section["kl"]["coef"] = 0.05 + seed
    runs = [read_run(write(tmp_path / str(i), [], config=section)) for i, section in enumerate(sections)]
    assert changed_settings(runs) == [("kl.coef", 0.05, [0.05, 1.05]), ("run.iterations", 30, [50, 50])]


def test_what_people_said_is_in_the_report(tmp_path):
    run = write(tmp_path / "run", [metrics(0)])
    pairs = [ratings.Pair(f"p{i}", "before", f"after {i}") for i in range(4)]
    ratings.write_pairs(run, pairs, {})
    with ratings.RatingsFile(run) as file:
        for rater in ("ada", "bob"):
            for pair, choice in zip(pairs, ("now", "now", "tie", "skip"), strict=True):
                file.append(rater, pair.id, choice)
    shown = " ".join(Read(html_of(run)).texts["main"].split())
    low, high = wilson_interval(5 / 6, 3)
    assert f"preferred in 83 % of 3 pairs (95 % interval {100 * low:.0f} to {100 * high:.0f} %)" in shown
    assert "4 for the policy, 0 for the SFT model, 2 ties, 2 skipped" in shown
    assert "2 raters agree on 100 % of 3 comparisons, Cohen's κ 1.00" in shown


# --------------------------------------------------------------------------------------------------------- command


def test_the_command_writes_one_file_and_reads_the_run_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = write(tmp_path / "run", [metrics(step) for step in range(4)], samples=[sample(0, "a b"), sample(4, "a c")])
    main([str(run), "--out", str(tmp_path / "out.html")])
    assert (tmp_path / "out.html").read_text("utf-8") == html_of(run)
    before = sorted(tmp_path.rglob("*"))
    main([str(run), "--samples"])
    assert sorted(tmp_path.rglob("*")) == before
    shown = capsys.readouterr().out
    assert "SFT (after 0 iterations)" in shown
    assert "KL 1.25 nats, 7 tokens" in shown


@pytest.mark.parametrize(
    ("spoil", "arguments", "message"),
    [
        (lambda run: None, ["absent"], "absent (resolved: "),
        (lambda run: (run / "metrics.jsonl").write_text("{}\n"), ["run"], "metrics.jsonl:1 is damaged"),
        (lambda run: (run / "config.yaml").write_text("a: [\n"), ["run"], "config.yaml cannot be read"),
        (lambda run: (run / "versions.json").write_text("[]"), ["run"], "versions.json holds list"),
        (lambda run: None, ["run", "--out", "absent/r.html"], "--out: absent/r.html cannot be written"),
        (lambda run: None, ["run", "--samples"], "monitor.sample_every was 0"),
    ],
    ids=["no-run", "line", "yaml", "json", "out", "samples"],
)
def test_what_a_user_can_mend_is_said_in_one_line_with_exit_code_2(
    tmp_path, monkeypatch, capsys, spoil, arguments, message
):
    monkeypatch.chdir(tmp_path)
    spoil(write(Path("run"), [metrics(0)]))
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("ppo-jax: ")
