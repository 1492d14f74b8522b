"""`python -m ppo_jax.report RUN [RUN ...]`: some runs as one HTML page, or their fixed prompts in the terminal."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ppo_jax import durable
from ppo_jax.errors import UserError
from ppo_jax.monitor.console import print_samples
from ppo_jax.monitor.samples import steps_so_far
from ppo_jax.report.page import page
from ppo_jax.report.runs import read_curves

EXIT_USER_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> None:
    """Exit code 0 when the page is written, 2 for anything the user can mend."""
    options = _parser().parse_args(arguments)
    try:
        curves = read_curves(options.runs)
        if options.samples:
            for run in [run for curve in curves for run in curve.runs]:
                if not run.samples:
                    raise UserError(f"{run.directory} has no answers to fixed prompts; monitor.sample_every was 0")
                print(run.directory)
                print_samples(run.samples, steps_so_far(run.samples))
            return
        try:
            durable.write_text(options.out, page(curves))
        except OSError as error:
            raise UserError(f"--out: {options.out} cannot be written: {error.strerror}") from error
        print(f"{options.out}: {options.out.stat().st_size / 1e3:.0f} kB, opens in any browser without a network")
    except UserError as error:
        print(f"ppo-jax: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ppo_jax.report", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "runs",
        metavar="[LABEL=]RUN[,RUN...]",
        nargs="+",
        help="run directories; those joined by commas (seeds of one recipe) are one curve, their mean, with a band "
        "from the smallest to the largest",
    )
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="file to write [report.html]")
    parser.add_argument("--samples", action="store_true", help="print the fixed prompts instead, and write nothing")
    return parser


if __name__ == "__main__":
    main()
