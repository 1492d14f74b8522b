"""`python -m parity`: the ladder, JAX against PyTorch on shared weights; one table, exit code 1 on any failure.

The gate is float64, where a bug stands 5 to 12 orders of magnitude above rounding; float32 is what ships. Each has a
process of its own, because JAX settles at its import whether there is a float64.
"""

import argparse
import json
import logging
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

DTYPES = ("float64", "float32")


def rows_in_this_process(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one dtype. What imports JAX is imported here, after its settings."""
    os.environ["JAX_ENABLE_X64"] = str(int(arguments.dtype == "float64"))
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax
    import torch
    from transformers.utils import logging as transformers_logging

    from parity.ladder import climb

    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_default_matmul_precision", "float32")
    transformers_logging.disable_progress_bar()
    if arguments.model is None:
        torch.set_num_threads(1)  # the random models are too small to share
        # What they and runs of a few answers are warned of is not what is compared.
        transformers_logging.set_verbosity_error()
        logging.getLogger("ppo_jax").setLevel(logging.ERROR)
    rows = climb(arguments.dtype, levels=arguments.levels, cases=arguments.cases, model=arguments.model)
    return [asdict(row) for row in rows]


def rows_of_all_dtypes(words: list[str]) -> list[dict[str, Any]]:
    """Rows of every dtype, one process each, side by side."""
    with tempfile.TemporaryDirectory() as directory:
        files = {dtype: Path(directory) / f"{dtype}.json" for dtype in DTYPES}
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "parity", *words, "--dtype", dtype, "--json", str(file)],
                stdout=subprocess.DEVNULL,
            )
            for dtype, file in files.items()
        ]
        codes = [process.wait() for process in processes]
        # 1 is a comparison that failed; a process that died wrote no rows.
        if not set(codes) <= {0, 1} or not all(file.is_file() for file in files.values()):
            raise SystemExit(f"a parity process died, see its message above (exit codes {codes})")
        rows = [row for file in files.values() for row in json.loads(file.read_text())]
        return [row | {key: float(row[key]) for key in ("error", "bound")} for row in rows]


def table_of(rows: list[dict[str, Any]]) -> Table:
    """One line per comparison: of each dtype the model that came closest to its bound, or failed first."""
    lines: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for row in sorted(rows, key=lambda row: int(row["level"][1:])):
        lines.setdefault((row["level"], row["compared"]), {}).setdefault(row["dtype"], []).append(row)
    table = Table(title="JAX against PyTorch: largest absolute difference over unmasked elements, and its bound")
    for column in (
        "level",
        "compared",
        "models",
        *(word for d in DTYPES for word in (d, "bound")),
        "closest",
        "verdict",
    ):
        table.add_column(column, justify="right" if column in ("models", "bound", *DTYPES) else "left")
    for (level, compared), by_dtype in lines.items():
        worst = {dtype: worst_of(group) for dtype, group in by_dtype.items()}
        numbers = [f"{worst[d][key]:.1e}" if d in worst else "" for d in DTYPES for key in ("error", "bound")]
        failed = [row for row in worst.values() if row["diverged"] is not None]
        closest = failed[0] if failed else max(worst.values(), key=closeness)
        models = max(len(group) for group in by_dtype.values())
        verdict = f"[bold red]FAIL[/] from {escape(failed[0]['diverged'])}" if failed else "[green]ok[/]"
        where = f"{closest['case']}: {closest['worst']}"
        table.add_row(level, escape(compared), str(models), *numbers, escape(where), verdict)
    return table


def is_json(x: Any) -> bool:
    return not isinstance(x, float) or math.isfinite(x)


def worst_of(group: list[dict[str, Any]]) -> dict[str, Any]:
    """The first row that failed, or the one closest to its bound."""
    return next((row for row in group if row["diverged"] is not None), max(group, key=closeness))


def closeness(row: dict[str, Any]) -> float:
    ratio = row["error"] / (row["bound"] or 1.0)
    return ratio if math.isfinite(ratio) else math.inf


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m parity", description=__doc__)
    parser.add_argument("--levels", type=lambda text: text.split(","), help="for instance L3,L8; by default all")
    parser.add_argument("--dtype", choices=DTYPES, help="by default each, in its own process")
    parser.add_argument("--cases", type=lambda text: text.split(","), help="random models, by default all")
    parser.add_argument("--model", type=Path, help="a Hugging Face directory in place of the random models")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    model = arguments.model
    if model is not None and arguments.cases is not None:
        parser.error("--cases are random models, --model takes their place; give one of the two")
    if model is not None and not ((model / "config.json").is_file() and list(model.glob("*.safetensors"))):
        parser.error(f"--model {model} is not a model directory: it needs config.json and *.safetensors")
    if arguments.dtype is None:
        rows = rows_of_all_dtypes(_without_json(sys.argv[1:]))
    else:
        rows = rows_in_this_process(arguments)
    if arguments.json is not None:
        # JSON has no infinity: what cannot be compared is "inf" there.
        finite = [{key: x if is_json(x) else str(x) for key, x in row.items()} for row in rows]
        arguments.json.write_text(json.dumps(finite, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    failed = [row for row in rows if row["diverged"] is not None]
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table_of(rows))
    if failed:
        first = failed[0]
        console.print(
            f"{len(failed)} of {len(rows)} comparisons failed; the first: {first['level']} {first['dtype']} "
            f"{first['case']}, {first['compared']}: {first['diverged']}",
            markup=False,
        )
    else:
        console.print(f"all {len(rows)} comparisons hold" if rows else "nothing was compared")
    return 1 if failed or not rows else 0


def _without_json(words: list[str]) -> list[str]:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--json")
    return parser.parse_known_args(words)[1]


if __name__ == "__main__":
    sys.exit(main())
