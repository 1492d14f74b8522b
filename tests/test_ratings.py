"""Ratings are never lost, undone ones do not count, and the statistics are those of SciPy and of a textbook."""

import errno
import fcntl
import json
import os

import pytest

from ppo_jax import ratings
from ppo_jax.errors import UserError
from ppo_jax.intervals import wilson_interval
from ppo_jax.ratings import NOW, SFT, SKIP, TIE, UNDO, Pair, RatingsFile

PAIRS = [Pair(f"prompt {i}", f"before {i}", f"after {i}") for i in range(4)]


def rows(directory):
    return [json.loads(line) for line in (directory / ratings.FILE).read_text("utf-8").splitlines()]


def test_kappa_is_that_of_the_textbook():
    # Two readers of 50 grant proposals: both say yes to 20, both no to 15, and 5 and 10 they see differently.
    said = [("yes", "yes")] * 20 + [("yes", "no")] * 5 + [("no", "yes")] * 10 + [("no", "no")] * 15
    assert ratings.cohens_kappa(said) == pytest.approx(0.4)
    assert ratings.cohens_kappa([("tie", "tie")] * 3) is None  # chance alone agrees


def test_a_tie_is_half_a_win_and_a_pair_counts_once_however_many_rated_it():
    choices = {"a": {"1": NOW, "2": TIE, "3": SFT, "4": SKIP}, "b": {"1": NOW, "2": SFT, "4": SKIP}, "c": {"1": SFT}}
    win = ratings.win_rate(choices)
    assert (win.wins, win.losses, win.ties, win.pairs) == (2, 3, 1, 3)
    assert win.rate == pytest.approx((2 / 3 + 1 / 4 + 0) / 3)
    assert (win.low, win.high) == wilson_interval(win.rate, 3)
    assert ratings.win_rate({"a": {"1": SKIP}}) is None


def test_agreement_is_over_pairs_that_two_raters_both_decided():
    two = {"a": {"1": NOW, "2": TIE, "3": SFT, "4": NOW}, "b": {"1": NOW, "2": SFT, "4": SKIP, "5": NOW}}
    found = ratings.agreement(two)
    assert (found.raters, found.pairs, found.share) == (2, 2, 0.5)
    assert found.kappa == pytest.approx((0.5 - 0.25) / (1 - 0.25))
    three = ratings.agreement(two | {"c": {"1": SFT, "3": SFT}})
    assert (three.raters, three.pairs, three.kappa) == (3, 5, None)
    assert three.share == pytest.approx(2 / 5)
    assert ratings.agreement({"a": {"1": NOW}, "b": {"2": NOW}}) is None


def test_what_was_undone_does_not_count_and_stays_in_the_file(tmp_path):
    with RatingsFile(tmp_path) as file:
        file.append("ada", "1", NOW)
        file.append("ada", "2", SFT)
        file.append("ada", "2", UNDO)
        file.append("ada", "2", TIE)
        file.append("ada", "3", SFT)
        file.append("ada", "3", UNDO)
        assert file.choices == {"ada": {"1": NOW, "2": TIE}}
    with RatingsFile(tmp_path) as file:
        assert file.choices == {"ada": {"1": NOW, "2": TIE}}
    assert len(rows(tmp_path)) == 6


def test_a_line_torn_by_a_kill_costs_itself_alone(tmp_path):
    with RatingsFile(tmp_path) as file:
        file.append("ada", "1", NOW)
    with (tmp_path / ratings.FILE).open("a") as file:
        file.write('{"pair": "2", "rat')
    with RatingsFile(tmp_path) as file:
        file.append("ada", "3", SFT)
    assert [(row["pair"], row["choice"]) for row in rows(tmp_path)] == [("1", NOW), ("3", SFT)]


def test_a_rating_that_a_full_disk_cut_short_is_neither_counted_nor_left_behind(tmp_path, monkeypatch):
    write = os.write
    with RatingsFile(tmp_path) as file:
        file.append("ada", "1", NOW)
        monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:9]))
        with pytest.raises(OSError, match="full"):
            file.append("ada", "2", NOW)
        monkeypatch.undo()
        assert file.choices == {"ada": {"1": NOW}}
        file.append("ada", "2", SFT)
    assert [(row["pair"], row["choice"]) for row in rows(tmp_path)] == [("1", NOW), ("2", SFT)]


def test_a_rating_is_on_the_disk_before_it_is_acknowledged(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.fstat(descriptor).st_size))
    with RatingsFile(tmp_path) as file:
        file.append("ada", "1", NOW)
        assert flushed[-1] == (tmp_path / ratings.FILE).stat().st_size > 0


def test_a_second_page_for_the_same_run_is_refused(tmp_path):
    with RatingsFile(tmp_path), pytest.raises(UserError, match="in use by another rating page"):
        RatingsFile(tmp_path)
    RatingsFile(tmp_path).__exit__()


def test_where_there_are_no_locks_ratings_are_taken_with_a_warning(tmp_path, monkeypatch, caplog):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with RatingsFile(tmp_path) as file:
        file.append("ada", "1", NOW)
    assert "cannot be locked (No locks available)" in caplog.text
    assert [(row["pair"], row["choice"]) for row in rows(tmp_path)] == [("1", NOW)]


def test_a_damaged_line_is_named_by_its_number(tmp_path):
    (tmp_path / ratings.FILE).write_text('{"pair": "1", "rater": "ada", "choice": "now"}\n{"pair": 2}\n')
    with pytest.raises(UserError, match=r"ratings.jsonl:2 is damaged \(no object with a pair\)"):
        RatingsFile(tmp_path)


def test_ratings_stay_with_the_texts_that_were_read(tmp_path):
    ratings.write_pairs(tmp_path, PAIRS, {})
    with RatingsFile(tmp_path) as file:
        for pair in PAIRS[:2]:
            file.append("ada", pair.id, NOW)
    assert ratings.read(tmp_path).choices == {"ada": {PAIRS[0].id: NOW, PAIRS[1].id: NOW}}
    ratings.write_pairs(tmp_path, [PAIRS[0], Pair("prompt 1", "before 1", "another policy's")], {})
    assert ratings.read(tmp_path).choices == {"ada": {PAIRS[0].id: NOW}}
    assert len({pair.id for pair in PAIRS}) == 4
