import json

import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax import jsonl
from ppo_jax.config import MonitorConfig
from ppo_jax.errors import UserError
from ppo_jax.monitor import answers, invariants, metrics, samples
from ppo_jax.monitor.console import print_samples
from ppo_jax.monitor.sinks import MetricsWriter, read_rows
from ppo_jax.records import EOS, TRUNCATED, Rollout, Scored


def test_one_flipped_bit_anywhere_moves_the_reference():
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(3, 4)).astype(np.float32), "b": jnp.asarray(rng.normal(size=5), jnp.bfloat16)}
    before = invariants.digest(params)
    invariants.assert_same_digest(invariants.digest(params), before)
    for position in range(12):
        flipped = params["a"].copy()
        flipped.reshape(-1).view(np.uint32)[position] ^= 1
        with pytest.raises(UserError, match="reference model moved"):
            invariants.assert_same_digest(invariants.digest(params | {"a": flipped}), before)
    swapped = params["a"][::-1].copy()
    assert invariants.digest(params | {"a": swapped}) != before


@pytest.mark.parametrize(
    ("numbers", "cause"),
    [
        ({"kl/token_max_nats": 1e-3, "rollout/logprob_gap_max": 0.0}, "reference is not the model"),
        ({"kl/token_max_nats": float("nan"), "rollout/logprob_gap_max": 0.0}, "reference is not the model"),
        ({"kl/token_max_nats": 0.0, "rollout/logprob_gap_max": 0.01}, "decode with its cache"),
    ],
)
def test_a_policy_that_is_not_its_reference_is_caught_before_the_first_step(numbers, cause):
    with pytest.raises(UserError, match=cause):
        invariants.assert_equals_reference(numbers, compute_dtype="float32")


@pytest.mark.parametrize("numbers", [(0.01, 0.0), (float("nan"), 0.0), (0.0, 0.1)])
def test_a_first_ratio_other_than_one_is_caught(numbers):
    gap, clipped = numbers
    with pytest.raises(UserError, match="ratio must be 1"):
        invariants.assert_ratio_is_one(
            {"policy/log_ratio_abs_max": gap, "policy/clip_frac": clipped}, compute_dtype="float32"
        )


def test_correct_numbers_pass_the_checks_of_step_zero():
    invariants.assert_equals_reference(
        {"kl/token_max_nats": 0.0, "rollout/logprob_gap_max": 1e-4}, compute_dtype="float32"
    )
    invariants.assert_ratio_is_one({"policy/log_ratio_abs_max": 1e-4, "policy/clip_frac": 0.0}, compute_dtype="float32")


def test_metrics_are_those_of_the_response_tokens_alone():
    rng = np.random.default_rng(1)
    lengths = np.array([3, 1, 4])
    mask = np.arange(4)[None] < lengths[:, None]

    def values():
        return jnp.asarray(np.where(mask, -rng.random(mask.shape), 1e9), jnp.float32)

    scored = Scored(old_logprobs=values(), ref_logprobs=values(), token_kl=values(), token_entropy=values())
    tokens = jnp.zeros(mask.shape, jnp.int32)
    rollout = Rollout(
        prompt_tokens=tokens,
        prompt_mask=jnp.ones(mask.shape, bool),
        response_tokens=tokens,
        response_mask=jnp.asarray(mask),
        behaviour_logprobs=values(),
        kept_mass=values(),
        finish_reason=jnp.asarray([EOS, EOS, TRUNCATED]),
        group_id=jnp.arange(3),
        policy_version=jnp.zeros((), jnp.int32),
    )
    scores = jnp.asarray([1.0, -1.0, 3.0])
    found = metrics.to_host(
        metrics.experience_metrics(rollout, scored, scores, jnp.float32(0.25), shaped_scores=2 * scores, returns=None)
    )
    old, ref, kl = (np.asarray(x, np.float64) for x in (scored.old_logprobs, scored.ref_logprobs, scored.token_kl))
    expected = {
        "kl/seq_nats": np.mean([kl[b, :n].sum() for b, n in enumerate(lengths)]),
        "kl/token_nats": kl[mask].mean(),
        "kl/token_max_nats": kl[mask].max(),
        "kl/k1_seq_nats": np.mean([(old - ref)[b, :n].sum() for b, n in enumerate(lengths)]),
        "kl/k2_seq_nats": np.mean([(old - ref)[b, :n] @ (old - ref)[b, :n] / 2 for b, n in enumerate(lengths)]),
        "kl/k3_seq_nats": np.mean([(np.exp(ref - old) - 1 + old - ref)[b, :n].sum() for b, n in enumerate(lengths)]),
        "kl/coef": 0.25,
        "score/mean": 1.0,
        "score/shaped_mean": 2.0,
        "score/shaped_std": 2 * np.std([1.0, -1.0, 3.0]),
        "score/std": np.std([1.0, -1.0, 3.0]),
        "reward/mean": 1.0 - 0.25 * np.mean([kl[b, :n].sum() for b, n in enumerate(lengths)]),
        "response/len_mean_tokens": lengths.mean(),
        "response/truncated_frac": 1 / 3,
        "logprob/mean": old[mask].mean(),
        **{f"logprob/{name}": np.quantile(old[mask], q) for name, q in metrics.QUANTILES.items()},
        "policy/entropy_nats": np.asarray(scored.token_entropy)[mask].mean(),
        "rollout/logprob_gap_max": np.abs(np.asarray(rollout.behaviour_logprobs) - old)[mask].max(),
        "rollout/kept_mass": np.asarray(rollout.kept_mass)[mask].mean(),
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)


def test_a_resumed_run_writes_no_step_twice(tmp_path):
    quiet = MonitorConfig(tensorboard=False)
    with MetricsWriter(tmp_path, first_step=0, monitor=quiet) as writer:
        for step in range(5):
            writer.write(step, {"score/mean": float(step)})
    with MetricsWriter(tmp_path, first_step=3, monitor=quiet) as writer:
        writer.write(3, {"score/mean": 30.0})
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["score/mean"]) for row in rows] == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 30.0)]


def test_tensorboard_files_hold_every_number(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    with MetricsWriter(tmp_path, first_step=0, monitor=MonitorConfig()) as writer:
        writer.write(7, {"kl/seq_nats": 0.25})
    data = next((tmp_path / "tensorboard").glob("events*")).read_bytes()
    events, position = [], 0
    while position < len(data):  # length, checksum of it, record, checksum of that
        length = int.from_bytes(data[position : position + 8], "little")
        events.append(Event.FromString(data[position + 12 : position + 12 + length]))
        position += 16 + length
    values = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]
    assert (7, "kl/seq_nats", 0.25) in values


def append_sample(directory, step, answer):
    numbers = {"scores": np.array([0.5]), "seq_kl": np.array([0.25]), "lengths": np.array([3])}
    samples.append(directory, step, ["p"], [answer], **numbers)


def test_the_closing_table_shows_the_start_the_middle_and_the_end(tmp_path):
    for step in (0, 10, 20, 30):
        append_sample(tmp_path, step, f"answer {step}")
    rows = samples.read(tmp_path)
    assert samples.steps_at_end(rows, 30) == {"SFT": 0, "half-way": 10, "now": 30}
    assert samples.steps_so_far(rows) == {"SFT": 0, "previous": 20, "now": 30}
    assert samples.steps_so_far(rows[:2]) == {"SFT": 0, "now": 10}
    assert samples.steps_so_far(rows[:1]) == {"SFT": 0}
    append_sample(tmp_path, 20, "again")
    assert [json.loads(line)["step"] for line in (tmp_path / "samples.jsonl").read_text().splitlines()] == [0, 10, 20]


def test_samples_survive_line_separators_half_surrogates_and_a_torn_last_line(tmp_path):
    texts = ["one\u2028two\u0085three", "half \ud83d of a pair", '<script>"\x1b[31m\x00', "\\ud800 as written"]
    for step, text in enumerate(texts):
        append_sample(tmp_path, step, text)
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"step": 9, "pro')
    assert [row["answer"] for row in samples.read(tmp_path)] == texts


def test_kept_answers_are_the_extremes_and_two_that_seed_and_step_choose():
    scores, seq_kl, lengths = np.array([0.5, 3.0, -1.0, 0.0, 0.1]), np.array([0.1, 0.2, 0.0, 9.0, 1.0]), np.arange(1, 6)

    def pick(step, seed=0):
        return answers.pick(step, scores, seq_kl, lengths, seed=seed)

    for step in range(40):
        reasons = {(i, why) for i, reasons in pick(step).items() for why in reasons}
        assert {(1, "best"), (2, "worst"), (3, "most divergent"), (4, "longest")} <= reasons
        assert len(reasons) == 6
    random = {step: tuple(i for i, why in pick(step).items() if "random" in why) for step in range(40)}
    assert all(len(chosen) == 2 for chosen in random.values())
    assert {i for chosen in random.values() for i in chosen} == set(range(5))
    assert pick(3) == pick(3)
    assert [pick(step) for step in range(9)] != [pick(step, seed=1) for step in range(9)]


def test_an_answer_that_was_left_out_of_its_iteration_is_not_kept():
    """It has no token there, and its score of 0 and its KL of 0 say nothing of it."""
    scores, seq_kl, lengths = np.array([-1.0, 0.0, -2.0]), np.array([0.2, 0.0, 0.1]), np.array([3, 0, 5])
    assert set(answers.pick(0, scores, seq_kl, lengths, seed=0)) == {0, 2}
    assert answers.pick(0, scores, seq_kl, 0 * lengths, seed=0) == {}


def test_a_batch_smaller_than_what_is_kept_is_kept_whole():
    one = np.array([0.5])
    assert answers.pick(0, one, one, one, seed=0) == {0: ["best", "worst", "longest", "most divergent", "random"]}


def test_a_resumed_run_has_no_kept_answer_twice(tmp_path):
    text = "\ud83d<script>\u2028"
    written = [jsonl.line({"step": step, "answer": text}) for step in (0, 10, 20, 20)]
    (tmp_path / answers.FILE).write_text("".join(written) + '{"step": 2', encoding="utf-8")
    answers.cut_back(tmp_path, 20)
    assert answers.read(tmp_path) == [{"step": 0, "answer": text}, {"step": 10, "answer": text}]
    assert (tmp_path / answers.FILE).read_bytes().endswith(b"}\n")


def test_a_text_is_not_markup_and_does_nothing_in_a_terminal(capsys):
    rows = [
        {"step": step, "prompt": "[red]p", "answer": f"\x1b[2Jword {step}[/]\ud83d", "score": 0.5} for step in (0, 1)
    ]
    print_samples(rows, {"SFT": 0, "now": 1})
    shown = capsys.readouterr().out
    assert "[red]p" in shown
    assert "␛[2Jword 1[/]⟨U+D83D⟩" in shown
    assert "\x1b[2J" not in shown
