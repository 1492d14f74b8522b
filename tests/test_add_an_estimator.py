"""docs/add_an_estimator.md still applies: its diffs, put into a copy of the code, add the estimator in both stacks."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
PAGE = REPOSITORY / "docs" / "add_an_estimator.md"
# Run in the copy: the new value is read, and both rows of the new estimator hold for one pair in each stack.
CHECK = """
import jax
from parity.truth import forms, training
from ppo_jax.config_file import load

jax.config.update("jax_disable_most_optimizations", True)
assert load(overrides={"advantage.estimator": "to_go"}).advantage.estimator == "to_go"
claims = [claim for claim in forms.OF_FORMS if "to go" in claim.name and "leave" not in claim.name]
with jax.enable_x64(True):
    for row in training.rows_of("C", claims, pairs=1, torch_pairs=1):
        print(row.stack, row.name, "holds" if row.holds else f"errs by {row.largest}", sep=": ")
"""


def diffs():
    return "".join(re.findall(r"```diff\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))


def run(directory, *command, **options):
    environment = os.environ | {"PYTHONPATH": str(directory), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, encoding="utf-8", check=False, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_page_adds_an_estimator_that_holds_its_claims(tmp_path):
    for package in ("ppo_jax", "ppo_torch_ref", "parity"):
        shutil.copytree(
            REPOSITORY / package, tmp_path / package, ignore=shutil.ignore_patterns("assets", "__pycache__")
        )
    run(tmp_path, "git", "apply", "-", input=diffs())
    assert run(tmp_path, sys.executable, "-c", CHECK).splitlines() == [
        f"{stack}: {form}, to go, B = 2: holds" for stack in ("JAX", "PyTorch") for form in ("k1", "exact")
    ]
