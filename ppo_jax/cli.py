"""The command line of `python -m ppo_jax.train` and `ppo-jax`: arguments in, messages and exit codes out."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ppo_jax import config_file
from ppo_jax.config import sections
from ppo_jax.errors import UserError
from ppo_jax.resumed import load_resumed

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> None:
    """Exit code 0 when the run ended as configured, 2 for anything the user can mend, 130 and 143 (128 + the signal)
    when Ctrl-C or SIGTERM ended it."""
    try:
        run(sys.argv[1:] if arguments is None else arguments)
    except UserError as error:
        print(f"ppo-jax: {error}", file=sys.stderr, flush=True)  # other processes may keep this one waiting at its end
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        print(
            "ppo-jax: interrupted; --resume continues from the last checkpoint, if there is one",
            file=sys.stderr,
        )
        sys.exit(EXIT_INTERRUPTED)


def run(arguments: Sequence[str]) -> None:
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    overrides = parse_overrides(rest)
    if options.resume is not None:
        if options.config is not None:
            raise UserError("--resume takes the configuration of the run; --config cannot be given with it")
        config = load_resumed(Path(options.resume), overrides, allowed=options.allow_change)
    else:
        config = config_file.load(options.config, overrides)
    if options.print_config:
        print(config.to_yaml(), end="")
        return
    # Imported here: `ppo-jax --help` and a bad configuration need no JAX.
    from ppo_jax import processes

    if options.distributed:
        processes.join()
    processes.check_platform("any" if options.dry_run else config.mesh.platform)
    if options.dry_run:
        from ppo_jax.plan import print_plan

        print_plan(config, resume=options.resume is not None)
        return
    from ppo_jax import compilation_cache
    from ppo_jax.build import build
    from ppo_jax.train import train

    compilation_cache.turn_on()
    if processes.is_lead():
        print(*compilation_cache.prepare(), sep="\n", flush=True)
    result = train(*build(config, resume=options.resume is not None, allowed_changes=options.allow_change))
    if not processes.is_lead():
        return
    if result.metrics:
        first, last = result.metrics[0], result.metrics[-1]
        print(
            f"From iteration {first['step']} to {last['step']}: score {first['score/mean']:+.3f} -> "
            f"{last['score/mean']:+.3f}, KL {last['kl/seq_nats']:.3f} nats per sequence, length "
            f"{first['response/len_mean_tokens']:.1f} -> {last['response/len_mean_tokens']:.1f} tokens."
        )
    print(f"Stopped: {result.stop_reason}.")
    print(f"Run: {result.directory}\nPolicy, in Hugging Face format: {result.policy_directory}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ppo_jax.train",
        description="PPO fine-tuning of a language model. Without arguments it trains the embedded tiny model to write "
        "positive reviews.",
        epilog="Every field of the configuration can be set on the command line, values are YAML:\n" + help_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with the fields below; the rest are the defaults")
    parser.add_argument("--resume", metavar="RUN", help="continue a run directory from its newest checkpoint")
    parser.add_argument(
        "--allow_change",
        metavar="NAME",
        action="append",
        default=[],
        help="with --resume: a key that may differ from the last start, or reference, tokenizer or prompts",
    )
    parser.add_argument("--print_config", action="store_true", help="print the resolved configuration and exit")
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="this is one of several processes; Slurm and Open MPI are recognised, else JAX_COORDINATOR_ADDRESS, "
        "JAX_NUM_PROCESSES and JAX_PROCESS_ID say which",
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="print shapes, memory and a time estimate; nothing is trained or written",
    )
    return parser


def help_text() -> str:
    """Every field with its type, default and meaning."""
    lines = []
    for name, section in sections():
        lines.append(f"\n{name}:")
        for key, field in section.model_fields.items():
            kind = _type_name(field.annotation)
            lines.append(f"  --{name}.{key} {kind}  [{_shown(field.default)}]\n      {field.description}")
    return "\n".join(lines)


def _type_name(annotation: Any) -> str:
    text = (
        annotation.__name__ if isinstance(annotation, type) and not hasattr(annotation, "__args__") else str(annotation)
    )
    arguments: tuple[Any, ...] = getattr(annotation, "__args__", ())
    if text.startswith("typing.Literal"):
        return "|".join(arguments)
    if text.startswith("typing.Annotated"):
        return _type_name(arguments[0])
    if text.startswith("dict["):
        return "{NAME: VALUE, ...}"
    if text.startswith("tuple["):
        return "[TEXT, ...]"
    names = [_type_name(argument) for argument in arguments if argument is not type(None)]
    return "|".join([*names, "null"] if type(None) in arguments else names) if names else text


def _shown(default: Any) -> str:
    return yaml.safe_dump(list(default) if isinstance(default, tuple) else default, default_flow_style=True).split(
        "\n"
    )[0]


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """`--section.key VALUE` or `--section.key=VALUE` pairs; values are YAML (numbers, true, null, [lists])."""
    overrides, rest = {}, list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or "." not in word:
            raise UserError(f"unexpected argument {word!r}; overrides are written --section.key VALUE, see --help")
        key, equals, text = word[2:].partition("=")
        if not equals:
            if not rest:
                raise UserError(f"{word} needs a value")
            text = rest.pop(0)
        try:
            overrides[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            overrides[key] = text
    return overrides
