"""The tables of docs/truth.md and docs/choices.md say what is: claims, keys, values, defaults, printed errors."""

import re
from pathlib import Path
from typing import get_args

import pytest
import yaml

from parity.truth import estimators, forms, terms
from ppo_jax.config import Config, known_keys

DOCS = Path(__file__).parent.parent / "docs"
PARTS = {
    "A": list(estimators.OF_KL),
    "B": list(estimators.OF_SCORE),
    "C": [claim.name for claim in forms.OF_FORMS],
    "D": [claim.name for claim in forms.OF_NORMALISERS],
    "E": [claim.name for claim in forms.OF_GROUPS + forms.OF_CRITICS],
    "F": [claim.name for claim in forms.OF_SHAPING],
    "G": list(estimators.OF_STATES),
    "H": [claim.name for claim in terms.OF_TERMS],
}
OF_CHOICES = ("kl.form", "kl.per", "reward.normalise", "advantage.estimator", "critic.kind", "update.normaliser")


def tables_of(text):
    """Cells of every line of every table, their heads left out."""
    lines = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("|---")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def truth(part):
    """The rows of one part: name to the numbers printed beside it."""
    (section,) = re.findall(rf"^## {part}\. .*?(?=^## |\Z)", (DOCS / "truth.md").read_text("utf-8"), re.DOTALL | re.M)
    rows = [row for row in tables_of(section) if row[-1] in ("exact", "biased")]
    return {row[0]: row[-7:-1] for row in rows}


def choices():
    """(keys and values named by a line, its default, its error) of docs/choices.md."""
    for row in tables_of((DOCS / "choices.md").read_text("utf-8"))[1:]:
        named = {key: yaml.safe_load(value) for key, value in re.findall(r"`([a-z_]+\.[a-z_]+): ([^`]+)`", row[0])}
        yield named, row[3], row[5]


def field_of(key):
    section, name = key.split(".")
    return getattr(getattr(Config(), section), name)


@pytest.mark.parametrize("part", PARTS)
def test_the_page_has_every_claim_of_the_command(part):
    assert list(truth(part)) == PARTS[part]


def test_every_choice_is_one_that_the_configuration_takes():
    named = [pair for line, _, _ in choices() for pair in line.items()]
    assert len(named) > 40
    for key, value in named:
        section, name = key.split(".")
        assert getattr(getattr(Config.model_validate({section: {name: value}}), section), name) == value


def test_every_choice_that_has_a_name_has_a_line():
    named = {(key, value) for line, _, _ in choices() for key, value in line.items()}
    fields = dict(known_keys())
    for key in OF_CHOICES:
        assert set(get_args(fields[key].annotation)) == {value for other, value in named if other == key}


def test_the_defaults_are_those_of_the_configuration():
    for named, default, _ in choices():
        for key, value in named.items():
            if default not in ("", "yes"):
                assert field_of(key) == yaml.safe_load(default), key
            else:
                assert (field_of(key) == value) == (default == "yes"), key


def test_every_error_is_one_that_the_page_of_truth_has():
    errors = [error for _, _, error in choices() if error not in ("", "error")]
    assert len(errors) > 50
    for error in errors:
        numbers = re.findall(r"\d\.\de[+-]\d\d", error)
        printed = [x for row in truth(error[-2]).values() for x in row]
        assert numbers, error
        assert set(numbers) <= set(printed), error


def test_every_test_that_the_table_of_faults_names_is_there():
    rows = [line for line in (DOCS / "reliability.md").read_text("utf-8").splitlines() if "`test_" in line]
    assert len(rows) > 20
    for row in rows:
        for file, tests in re.findall(r"(test_\w+): ((?:`test_\w+`(?:, )?)+)", row):
            source = (Path(__file__).parent / f"{file}.py").read_text("utf-8")
            assert all(f"def {test}(" in source for test in re.findall(r"`(\w+)`", tests)), row
