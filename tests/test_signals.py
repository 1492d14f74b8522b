"""Distributions of a batch's numbers: those of the real tokens alone, against NumPy in float64."""

import json
import sys
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.algorithm import k1_token_rewards
from ppo_jax.config import MonitorConfig
from ppo_jax.monitor import metrics, signals
from ppo_jax.monitor.alarms import Alarm
from ppo_jax.monitor.console import View
from ppo_jax.monitor.sinks import MetricsWriter
from ppo_jax.ops import masking
from ppo_jax.records import EOS, STOP_STRING, TRUNCATED, Rollout, Scored

# The third answer is an EOS alone, the fourth a stop string of one token, the last row padding of a bucket.
LENGTHS = np.array([3, 5, 1, 1, 4, 0])
MASK = np.arange(6)[None] < LENGTHS[:, None]
SCORES = np.array([1.0, -1.0, 3.0, 0.5, 3.0, 9.0], np.float32)
ANSWERED = LENGTHS > 0


def batch(junk):
    """Rollout and Scored whose masked positions hold `junk`."""
    rng = np.random.default_rng(1)

    def values():
        return jnp.asarray(np.where(MASK, -6 * rng.random(MASK.shape), junk), jnp.float32)

    tokens = jnp.zeros(MASK.shape, jnp.int32)
    scored = Scored(old_logprobs=values(), ref_logprobs=values(), token_kl=values(), token_entropy=values())
    rollout = Rollout(
        prompt_tokens=tokens,
        prompt_mask=jnp.ones(MASK.shape, bool),
        response_tokens=tokens,
        response_mask=jnp.asarray(MASK),
        behaviour_logprobs=values(),
        kept_mass=values(),
        finish_reason=jnp.asarray([EOS, TRUNCATED, EOS, STOP_STRING, EOS, TRUNCATED]),
        group_id=jnp.arange(6),
        policy_version=jnp.zeros((), jnp.int32),
    )
    return rollout, scored


def paid(scored, scores):
    """Token rewards of a shaped score (twice the score) and a sampled penalty of a quarter of the KL."""
    return k1_token_rewards(2 * scores, scored, jnp.asarray(MASK), kl_coef=jnp.float32(0.25))


def quantiles(prefix, x, unit=""):
    return {f"{prefix}{name}{unit}": np.quantile(x, q) for name, q in metrics.QUANTILES.items()}


def test_distributions_are_those_of_the_response_tokens_and_of_the_answers_that_there_are():
    rollout, scored = batch(junk=1e9)
    given = jnp.asarray(SCORES)
    found = metrics.to_host(signals.distribution_metrics(rollout, scored, given, 2 * given, paid(scored, given)))
    old, ref = (np.asarray(x, np.float64) for x in (scored.old_logprobs, scored.ref_logprobs))
    scores, lengths = SCORES[ANSWERED], LENGTHS[ANSWERED]
    penalties = [0.25 * (old - ref)[b, :n].sum() for b, n in enumerate(LENGTHS) if n]
    expected = {
        **quantiles("score/", scores),
        "score/at_min_frac": 1 / 5,
        "score/at_max_frac": 2 / 5,
        "score/len_correlation": np.corrcoef(scores, lengths)[0, 1],
        "reward/penalty_std": np.std(penalties),
        **quantiles("response/len_", lengths, "_tokens"),
        "response/empty_frac": 1 / 5,
        **quantiles("log_ratio/", (old - ref)[MASK]),
        "ref_logprob/mean": ref[MASK].mean(),
        **quantiles("ref_logprob/", ref[MASK]),
        "ref_logprob/perplexity": np.exp(-ref[MASK].mean()),
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("junk", [1e9, -3.0, float("nan"), float("-inf")])
def test_masked_junk_changes_neither_a_number_nor_a_bin(junk):
    numbers, counts = [], []
    for filler in (0.0, junk):
        rollout, scored = batch(filler)
        scores = jnp.asarray(np.where(ANSWERED, SCORES, filler), jnp.float32)
        rewards = paid(scored, jnp.asarray(np.where(ANSWERED, SCORES, 0.0), jnp.float32))
        rewards = jnp.where(MASK, rewards, filler)
        of_batch = signals.distribution_metrics(rollout, scored, scores, 2 * scores, rewards)
        numbers.append(metrics.to_host(of_batch))
        counts.append({name: np.asarray(x) for name, x in signals.histograms(rollout, scored).items()})
    assert numbers[0] == numbers[1]
    for name, bins in counts[0].items():
        np.testing.assert_array_equal(counts[1][name], bins)
        assert bins.sum() == LENGTHS.sum()
        values = {"logprob": scored.old_logprobs, "ref_logprob": scored.ref_logprobs}
        values["log_ratio"] = scored.old_logprobs - scored.ref_logprobs
        edges = np.asarray(signals.HISTOGRAM_EDGES[name])
        inside = np.clip(np.asarray(values[name.partition("/")[0]])[MASK], edges[0], edges[-1])
        np.testing.assert_array_equal(bins, np.histogram(inside, edges)[0])


def test_a_constant_has_no_correlation_and_large_scores_have_theirs():
    mask, x = jnp.ones(4, bool), jnp.asarray([1.0, 2.0, 3.0, 5.0])
    assert float(masking.masked_correlation(x, jnp.full(4, 7.0), mask)) == 0.0
    assert float(masking.masked_correlation(1e18 * x, -1e-20 * x, mask)) == pytest.approx(-1.0)
    assert float(masking.masked_correlation(x, x, jnp.zeros(4, bool))) == 0.0


ALARM = Alarm(3, 2, "kl_runaway", "warn", {"kl/seq_nats": 40.0}, "the KL runs away", "steps", "smaller ones", None)
COUNTS = np.bincount([10, 10, 79], minlength=80)
NUMBERS = {"kl/seq_nats": 40.0, "logprob/histogram": COUNTS}


def test_histograms_and_alarms_reach_tensorboard_and_the_row_has_neither(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    with MetricsWriter(tmp_path, first_step=0, monitor=MonitorConfig()) as writer:
        writer.write(3, NUMBERS, [ALARM])
    data, values, position = next((tmp_path / "tensorboard").glob("events*")).read_bytes(), {}, 0
    while position < len(data):  # length, checksum of it, record, checksum of that
        length = int.from_bytes(data[position : position + 8], "little")
        values |= {v.tag: v for v in Event.FromString(data[position + 12 : position + 12 + length]).summary.value}
        position += 16 + length
    drawn = values["logprob/histogram"].histo
    assert list(drawn.bucket) == COUNTS.tolist()
    assert (drawn.num, drawn.min, drawn.max) == (3, -17.5, 0.0)
    assert drawn.sum == pytest.approx(2 * -17.375 - 0.125)
    (said,) = [v for tag, v in values.items() if tag.startswith("alarm/kl_runaway")]
    assert ALARM.text().encode() in said.tensor.string_val[0]
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 3, "kl/seq_nats": 40.0}
    assert json.loads((tmp_path / "alarms.jsonl").read_text())["scene"] == "kl_runaway"


def test_a_resumed_run_keeps_the_alarms_of_earlier_steps_alone(tmp_path):
    quiet = MonitorConfig(tensorboard=False)
    for first_step, step in ((0, 3), (4, 4), (4, 5)):
        with MetricsWriter(tmp_path, first_step=first_step, monitor=quiet) as writer:
            writer.write(step, {"kl/seq_nats": 40.0}, [Alarm(**(vars(ALARM) | {"step": step}))])
    steps = [json.loads(line)["step"] for line in (tmp_path / "alarms.jsonl").read_text().splitlines()]
    assert steps == [3, 5]


def test_weights_and_biases_gets_every_number_and_the_histograms(tmp_path, monkeypatch):
    logged = []
    made = SimpleNamespace(log=lambda row, step: logged.append((step, row)), finish=lambda: logged.append("finished"))
    fake = SimpleNamespace(init=lambda **_: made, Histogram=lambda np_histogram: np_histogram)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with MetricsWriter(tmp_path, first_step=0, monitor=MonitorConfig(tensorboard=False, wandb_project="p")) as writer:
        writer.write(3, NUMBERS, [ALARM])
    (step, row), end = logged
    assert (step, end, row["kl/seq_nats"]) == (3, "finished", 40.0)
    counts, edges = row["logprob/histogram"]
    np.testing.assert_array_equal(counts, COUNTS)
    np.testing.assert_array_equal(edges, signals.HISTOGRAM_EDGES["logprob/histogram"])


def test_the_view_has_the_kl_first_then_score_and_length_and_what_has_alarmed(capsys):
    from rich.console import Console

    from ppo_jax.monitor.console import COLUMNS

    row = {name: 0.5 for _, name, _ in COLUMNS}
    with View(10, 3, live=False) as view:
        view.iteration(3, row, [ALARM])
    lines = capsys.readouterr().out.splitlines()
    assert "alarm (warn) kl_runaway, iteration 3: the KL runs away (kl/seq_nats 40)" in lines[0]
    assert lines[1].startswith("   3  KL nats/seq 0.500  score +0.500  ± std 0.500  tokens 0.5")
    console = Console(width=150, record=True, file=sys.stderr)
    console.print(view._render())
    drawn = console.export_text()
    assert drawn.index("KL nats/seq") < drawn.index("score") < drawn.index("tokens") < drawn.index("the KL runs away")
    assert "4/10" in drawn
