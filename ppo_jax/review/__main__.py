"""`python -m ppo_jax.review RUN`: people compare the policy's answers with the SFT model's."""

import argparse
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from ppo_jax.errors import UserError
from ppo_jax.ratings import RatingsFile

EXIT_USER_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> None:
    """Exit code 0 after Ctrl-C, which is how it ends, and 2 for anything the user can mend."""
    options = _parser().parse_args(arguments)
    try:
        with suppress(KeyboardInterrupt):
            run(options)
    except UserError as error:
        print(f"ppo-jax: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)


def run(options: argparse.Namespace) -> None:
    missing = [name for name in ("starlette", "uvicorn") if find_spec(name) is None]
    if missing:
        raise UserError(
            f"the rating page needs {' and '.join(missing)}: install the extra, pip install 'ppo-jax[review]'"
        )
    # Imported here: `--help` and a missing extra need no JAX.
    from ppo_jax.review import pairs, server
    from ppo_jax.review.session import Session

    if options.pairs < 1:
        raise UserError(f"--pairs: got {options.pairs}, expected at least 1")
    config = pairs.read_config(options.run)
    with RatingsFile(options.run) as file, server.listen(options.port) as listening:
        made = pairs.read_or_make(options.run, config, options.pairs, options.prompts)
        same = sum(pair.is_same for pair in made)
        print(f"{len(made) - same} pairs to rate; {same} more are left out, both answers are the same.")
        server.serve(Session(made, file, seed=config.run.seed), listening)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ppo_jax.review", description=__doc__, allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", type=Path, help="run directory with an exported policy")
    parser.add_argument("--pairs", type=int, default=40, help="how many prompts are answered by both models [40]")
    parser.add_argument(
        "--prompts", metavar="FILE", help="answer the prompts of this file, in the form of the run's, not the run's own"
    )
    parser.add_argument("--port", type=int, default=0, help="port on 127.0.0.1 [a free one]")
    return parser


if __name__ == "__main__":
    main()
