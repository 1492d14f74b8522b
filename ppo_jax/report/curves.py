"""Which charts a report has: the KL on top, then score, length, entropy and log-probs, then what steers the update."""

from ppo_jax.monitor.metrics import QUANTILES
from ppo_jax.report.drawing import Band, Chart, Drawing, Line, Mark, Rule, draw
from ppo_jax.report.runs import Curve

COLORS = 6
# Metrics of the smaller charts below: name -> title, unit. Those that no run has are left out.
OTHERS = {
    "reward/mean": ("Reward: score minus KL penalty", "mean of the batch"),
    "kl/coef": ("KL coefficient β", "score per nat"),
    "response/truncated_frac": ("Cut-off answers", "share"),
    "policy/clip_frac": ("Clipped tokens", "share"),
    "policy/approx_kl_nats": ("KL of one update", "nats per token"),
    "policy/ratio_max": ("Largest policy ratio", "π / π at rollout"),
    "update/grad_norm": ("Gradient norm", "before clipping"),
    "update/param_rel_change": ("Change of the parameters", "relative"),
    "critic/explained_variance": ("Explained variance of the critic", "1 is all"),
    "evaluation/win_rate": ("Held-out answers that beat the SFT model's", "share by score"),
    "rollout/kept_mass": ("Probability that sampling kept", "mean"),
    "time/iteration_s": ("Time of an iteration", "seconds"),
}


def x_range(curves: list[Curve]) -> tuple[float, float]:
    """First and last iteration of all charts."""
    steps = [row["step"] for curve in curves for run in curve.runs for row in run.rows]
    return (float(min(steps)), float(max(max(steps), min(steps) + 1))) if steps else (0.0, 1.0)


def main_charts(curves: list[Curve]) -> list[Drawing]:
    """KL, score, length, entropy and log-probs, every one with the alarms of all runs."""
    marks = _marks(curves)
    kl = Chart(
        "KL to the SFT model",
        "nats per answer, exact",
        [*_lines(curves, "kl/seq_nats"), *_dots(curves, "evaluation/kl_seq_nats")],
        _seed_bands(curves, "kl/seq_nats"),
        _kl_rules(curves),
        marks,
        from_zero=True,
        note=_held_out_note(curves, "evaluation/kl_seq_nats"),
    )
    score = Chart(
        "Score",
        "mean of the batch" + (", band: one standard deviation" if _is_single(curves) else ""),
        [*_lines(curves, "score/mean"), *_dots(curves, "evaluation/score_mean")],
        _deviation(curves) if _is_single(curves) else _seed_bands(curves, "score/mean"),
        marks=marks,
        note=_held_out_note(curves, "evaluation/score_mean"),
    )
    others = [
        Chart(title, unit, _lines(curves, name), _seed_bands(curves, name), marks=marks)
        for name, title, unit in (
            ("response/len_mean_tokens", "Length of the answers", "tokens, mean"),
            ("policy/entropy_nats", "Entropy of the policy", "nats per token"),
        )
    ]
    return [draw(chart, x_range(curves)) for chart in (kl, score, *others, _logprobs(curves, marks))]


def other_charts(curves: list[Curve]) -> list[Drawing]:
    """One of each of `OTHERS` that a run has."""
    charts = [
        Chart(title, unit, _lines(curves, name), _seed_bands(curves, name))
        for name, (title, unit) in OTHERS.items()
        if any(curve.points(name) for curve in curves)
    ]
    return [draw(chart, x_range(curves)) for chart in charts]


def _is_single(curves: list[Curve]) -> bool:
    return len(curves) == 1 and len(curves[0].runs) == 1


def _lines(curves: list[Curve], name: str) -> list[Line]:
    return [
        Line(curve.label, [(step, mean) for step, mean, _, _ in curve.points(name)], i % COLORS)
        for i, curve in enumerate(curves)
    ]


def _dots(curves: list[Curve], name: str) -> list[Line]:
    """What is measured every few iterations, after the iteration's update."""
    return [
        Line(f"{curve.label}, held out", [(step, mean) for step, mean, _, _ in points], i % COLORS, "dots")
        for i, curve in enumerate(curves)
        if (points := curve.points(name))
    ]


def _held_out_note(curves: list[Curve], name: str) -> str:
    return "Dots: held-out prompts." if _dots(curves, name) else ""


def _seed_bands(curves: list[Curve], name: str) -> list[Band]:
    """From the smallest to the largest of the runs that make one curve."""
    return [
        Band([(step, low, high) for step, _, low, high in curve.points(name)], i % COLORS)
        for i, curve in enumerate(curves)
        if len(curve.runs) > 1
    ]


def _deviation(curves: list[Curve]) -> list[Band]:
    deviation = {step: mean for step, mean, _, _ in curves[0].points("score/std")}
    around = [
        (s, m - deviation[s], m + deviation[s]) for s, m, _, _ in curves[0].points("score/mean") if s in deviation
    ]
    return [Band(around, 0)]


def _logprobs(curves: list[Curve], marks: list[Mark]) -> Chart:
    """The median over bands of the middle half, and for a single curve of the middle nine tenths."""
    bands, lines = [], []
    for i, curve in enumerate(curves):
        q = {name: {step: mean for step, mean, _, _ in curve.points(f"logprob/{name}")} for name in QUANTILES}
        # Of several curves the bands lie on one another.
        shown = [("q05", "q95", "faint"), ("q25", "q75", "band")] if len(curves) == 1 else [("q25", "q75", "faint")]
        for low, high, style in shown:
            both = sorted(q[low].keys() & q[high].keys())
            bands.append(Band([(step, q[low][step], q[high][step]) for step in both], i % COLORS, style))
        lines.append(Line(f"{curve.label}, median", list(q["q50"].items()), i % COLORS))
        if len(curves) == 1:
            lines += [
                Line(f"{int(name[1:])} %", list(q[name].items()), i, "unseen") for name in QUANTILES if name != "q50"
            ]
    unit = "nats; median, middle 50 %" + (", 90 %" if len(curves) == 1 else "")
    return Chart("Log-probs of the sampled tokens", unit, lines, bands, marks=marks)


def _kl_rules(curves: list[Curve]) -> list[Rule]:
    rules = {}
    for key, label in (("kl.target_nats", "target"), ("run.max_seq_kl_nats", "budget")):
        for value in sorted({run.config[key] for c in curves for run in c.runs if run.config.get(key) is not None}):
            rules[label, value] = Rule(f"{label} {value:g}", float(value))
    return list(rules.values())


def _marks(curves: list[Curve]) -> list[Mark]:
    several = sum(len(curve.runs) for curve in curves) > 1
    return [
        Mark(
            alarm["step"],
            alarm["level"],
            f"{run.name + ', ' if several else ''}iteration {alarm['step']}: "
            f"{alarm.get('message') or alarm.get('scene')}",
        )
        for curve in curves
        for run in curve.runs
        for alarm in run.alarms
    ]
