"""Imports go down only, torch stays out of the trainer, and the mathematics depends on JAX alone.

Read from the source with `ast`, imports inside of functions included, so that a lazy import hides nothing.
"""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# The first part of a module's name inside of ppo_jax and its level; a new one must be given a level here.
LEVELS = {
    "errors": 0, "durable": 0, "records": 0, "config": 0, "config_file": 0, "generate_config": 0, "misfits": 0,
    "reward_model_config": 0, "tracing": 0, "compilation_cache": 0, "resumed": 0, "assets": 0,
    "shown_text": 0, "intervals": 0, "host_memory": 0,
    "jsonl": 1, "ops": 1, "processes": 1, "interruption": 1, "prompt_files": 1, "prompt_forms": 1,
    "ratings": 2, "models": 2, "run_lock": 2, "prompts": 2, "sharding": 2, "stop_strings": 2, "pairs": 2,
    "answer_file": 2, "optimizer": 2,
    "rollout": 3, "scoring": 3, "update": 3, "rewards": 3, "monitor": 3, "checkpoint": 3, "report": 3,
    "reward_training": 3, "initial_state": 3,
    "algorithm": 4, "build": 4, "run_directory": 4,
    "ending": 5, "evaluation": 5, "export": 5, "review": 5, "generate": 6, "train": 6, "plan": 6, "reward_model": 6,
    "cli": 7, "__init__": 8, "__main__": 8,
}  # fmt: skip
SAME_LEVEL = {
    ("build", "algorithm"),
    ("build", "run_directory"),
    ("config_file", "config"),
    ("config_file", "errors"),
    ("config_file", "misfits"),
    ("misfits", "config"),
    ("generate_config", "misfits"),
    ("reward_model_config", "misfits"),
    ("generate_config", "config"),
    ("generate_config", "config_file"),
    ("generate_config", "errors"),
    ("reward_model_config", "config"),
    ("reward_model_config", "config_file"),
    ("config", "errors"),
    ("resumed", "config"),
    ("resumed", "config_file"),
    ("resumed", "errors"),
    ("records", "errors"),
    ("models", "sharding"),
    ("prompt_forms", "prompt_files"),
    ("report", "monitor"),  # which writes what a report reads
}


def imports_of(file: Path, package: str) -> set[str]:
    """Dotted names of everything a file imports; `from a import b` counts as a.b."""
    found = set()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    # What runs only as a script (`python -m ppo_jax.train`) is an entry point, above every level.
    tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and "__name__" in ast.dump(node.test))]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")
                base = ".".join([*above[: len(above) - node.level + 1], *([base] if base else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def modules(root: Path, package: str):
    """(file, its dotted package, dotted names imported) of every file under a top-level package."""
    for file in sorted((root / package).rglob("*.py")):
        dotted = ".".join(file.relative_to(root).parent.parts)
        yield file, dotted, imports_of(file, dotted)


def top(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def violations(root: Path) -> list[str]:
    """Every broken rule, as `file: what it imports`."""
    found = []
    forbidden = {
        "ppo_jax": {"torch", "ppo_torch_ref", "parity"},
        "ppo_torch_ref": {"jax", "flax", "optax", "ppo_jax", "parity"},
    }
    for package, never in forbidden.items():
        for file, _, names in modules(root, package):
            found += [f"{file.relative_to(root)}: {name}" for name in sorted(top(names) & never)]
    for file, _, names in modules(root, "ppo_jax"):
        path = file.relative_to(root / "ppo_jax")
        own = path.parts[0] if len(path.parts) > 1 else path.stem
        if own not in LEVELS:
            found.append(f"{file.relative_to(root)}: has no level in tests/test_layering.py")
            continue
        inner = {name.split(".")[1] for name in names if name.startswith("ppo_jax.")}
        # `from ppo_jax import fine_tune` names no module: it needs the package's own file, which is the highest of all.
        inner = {name if name in LEVELS else "__init__" for name in inner - {"__version__"}}
        found += [
            f"{file.relative_to(root)}: ppo_jax.{other}"
            for other in sorted(inner - {own})
            if LEVELS[other] >= LEVELS[own] and (own, other) not in SAME_LEVEL
        ]
        if own == "ops":
            allowed = sys.stdlib_module_names | {"jax", "jaxtyping", "ppo_jax"}
            found += [f"{file.relative_to(root)}: {name}" for name in sorted(top(names) - allowed)]
            found += [
                f"{file.relative_to(root)}: ppo_jax.{other}" for other in sorted(inner - {"ops"}) if LEVELS[other] < 1
            ]
    return found


def test_the_repository_keeps_its_layers():
    assert violations(ROOT) == []


def test_the_check_reads_the_files_that_exist():
    assert {"ops", "models", "rollout", "scoring", "update", "train"} <= {
        path.stem if path.is_file() else path.name for path in (ROOT / "ppo_jax").iterdir()
    }


@pytest.mark.parametrize(
    ("file", "text", "violation"),
    [
        ("ppo_jax/update.py", "import torch.nn", "ppo_jax/update.py: torch"),
        ("ppo_jax/update.py", "def f():\n    from torch import nn", "ppo_jax/update.py: torch"),
        ("ppo_jax/train.py", "from parity import ladder", "ppo_jax/train.py: parity"),
        ("ppo_jax/models/decoder.py", "import ppo_torch_ref.model", "ppo_jax/models/decoder.py: ppo_torch_ref"),
        ("ppo_torch_ref/ops.py", "import jax.numpy as jnp", "ppo_torch_ref/ops.py: jax"),
        ("ppo_torch_ref/ops.py", "from ppo_jax.ops import kl", "ppo_torch_ref/ops.py: ppo_jax"),
        ("ppo_jax/ops/kl.py", "import numpy as np", "ppo_jax/ops/kl.py: numpy"),
        ("ppo_jax/ops/kl.py", "from ppo_jax.records import Rollout", "ppo_jax/ops/kl.py: ppo_jax.records"),
        ("ppo_jax/ops/kl.py", "from ppo_jax.config import Config", "ppo_jax/ops/kl.py: ppo_jax.config"),
        ("ppo_jax/ops/kl.py", "from ..models import decoder", "ppo_jax/ops/kl.py: ppo_jax.models"),
        ("ppo_jax/update.py", "from ppo_jax.scoring import score", "ppo_jax/update.py: ppo_jax.scoring"),
        ("ppo_jax/update.py", "from ppo_jax import rollout", "ppo_jax/update.py: ppo_jax.rollout"),
        (
            "ppo_jax/monitor/metrics.py",
            "from ppo_jax.rewards import source",
            "ppo_jax/monitor/metrics.py: ppo_jax.rewards",
        ),
        ("ppo_jax/rewards/source.py", "import ppo_jax.build", "ppo_jax/rewards/source.py: ppo_jax.build"),
        ("ppo_jax/build.py", "from ppo_jax import fine_tune", "ppo_jax/build.py: ppo_jax.__init__"),
        ("ppo_jax/records.py", "from ppo_jax.config import Config", "ppo_jax/records.py: ppo_jax.config"),
        ("ppo_jax/misc.py", "", "ppo_jax/misc.py: has no level in tests/test_layering.py"),
    ],
)
def test_a_planted_import_is_found(tmp_path, file, text, violation):
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(text)
    assert violation in violations(tmp_path)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("ppo_jax/ops/kl.py", "import math\nimport jax\nfrom jaxtyping import Array\nfrom ppo_jax.ops import masking"),
        (
            "ppo_jax/monitor/metrics.py",
            "from ppo_jax.monitor import alarms\nfrom ppo_jax.ops.masking import masked_mean",
        ),
        ("ppo_jax/train.py", "import jax\nfrom ppo_jax import rollout, update\nfrom ppo_jax.build import build"),
        ("ppo_jax/config.py", "from ppo_jax.errors import UserError"),
    ],
)
def test_an_import_that_goes_down_is_allowed(tmp_path, file, text):
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(text)
    assert violations(tmp_path) == []
