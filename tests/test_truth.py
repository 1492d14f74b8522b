"""The expected gradient over every possible batch is that of the true objective, in both stacks."""

import json
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Rows of `python -m parity.truth`, in a process of its own for its float64."""
    file = tmp_path_factory.mktemp("truth") / "rows.json"
    words = ["--pairs", "4", "--torch_pairs", "1", "--json", str(file)]
    finished = subprocess.run([sys.executable, "-m", "parity.truth", *words], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return json.loads(file.read_text())


def test_the_forms_that_are_claimed_to_be_exact_are_exact_in_both_stacks(rows):
    exact = {(row["stack"], row["form"]): row["largest"] for row in rows if row["claimed"] == "exact"}
    assert len(exact) == 8
    assert max(exact.values()) < 1e-12


def test_either_half_of_the_exact_form_alone_and_a_batch_mean_beside_it_are_seen_to_be_biased(rows):
    biased = {(row["stack"], row["form"]): row["smallest"] for row in rows if row["claimed"] == "biased"}
    assert len(biased) == 6
    assert min(biased.values()) > 1e-3
