"""The command line of `python -m ppo_jax.train` and `ppo-jax`: arguments in, messages and exit codes out."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from ppo_jax import config_file, generate_config, reward_model_config
from ppo_jax.config import EMBEDDED, Config, Settings, known_keys, sections
from ppo_jax.errors import UserError
from ppo_jax.resumed import load_resumed

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> None:
    """Exit code 0 when the run ended as configured, 2 for anything the user can mend, 130 and 143 (128 + the signal)
    when Ctrl-C or SIGTERM ended it."""
    _exiting(run, arguments, if_interrupted="--resume continues from the last checkpoint, if there is one")


def generate_main(arguments: Sequence[str] | None = None) -> None:
    """`python -m ppo_jax.generate`; exit codes as of `main`."""
    _exiting(generate, arguments, if_interrupted="the same command continues behind the last whole answer")


def reward_model_main(arguments: Sequence[str] | None = None) -> None:
    """`python -m ppo_jax.reward_model`; exit codes as of `main`."""
    _exiting(train_reward_model, arguments, if_interrupted="the training starts anew next time")


def _exiting(command: Callable[[Sequence[str]], None], arguments: Sequence[str] | None, *, if_interrupted: str) -> None:
    try:
        command(sys.argv[1:] if arguments is None else arguments)
    except UserError as error:
        print(f"ppo-jax: {error}", file=sys.stderr, flush=True)  # other processes may keep this one waiting at its end
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        print(f"ppo-jax: interrupted; {if_interrupted}", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


def run(arguments: Sequence[str]) -> None:
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    overrides = parse_overrides(rest) | ({"monitor.live": False} if options.quiet else {})
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
    from ppo_jax import host_memory, processes

    host_memory.keep_freed()
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
    if result.adapter_directory is not None:
        print(f"Adapter, in PEFT format: {result.adapter_directory}")


def generate(arguments: Sequence[str]) -> None:
    options, rest = _generate_parser().parse_known_args(arguments)
    overrides = {key: _yaml_value(text) for key, text in vars(options).items() if "." in key} | parse_overrides(rest)
    for key, given in (("model.path", options.model), ("prompts.path", options.prompts)):
        if given is not None and key in overrides:
            raise UserError(f"{key} is given twice: {given!r} and {overrides[key]!r}")
        overrides |= {} if given is None else {key: given}
    config = generate_config.load(options.config, overrides, scored=options.reward)
    from ppo_jax import host_memory, processes

    host_memory.keep_freed()
    processes.check_platform(config.mesh.platform)
    from ppo_jax.generate import generate

    total, before = generate(config, Path(options.out), scored=options.reward)
    print(f"{total} answers are in {options.out}" + (f", {before} of them from before." if before else "."))


def _generate_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ppo_jax.generate",
        description="A model answers prompts: JSONL, one object per answer. After a kill the same command continues.",
        epilog="These fields of a run's configuration can be set, values are YAML:\n"
        + help_text(generate_config.GenerateConfig, generate_config.READ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help=f"Hugging Face directory or hub id, RUN/policy, or {EMBEDDED!r}")
    parser.add_argument("--prompts", metavar="FILE", help="the same as --prompts.path")
    parser.add_argument("--out", metavar="FILE", default="answers.jsonl", help="where the answers go [answers.jsonl]")
    parser.add_argument("--reward", action="store_true", help="also score the answers, as the reward section says")
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file with the fields below, RUN/config.yaml for instance"
    )
    for key, _ in known_keys():  # known to the parser, so that MODEL may stand behind them
        parser.add_argument(f"--{key}", dest=key, help=argparse.SUPPRESS, default=argparse.SUPPRESS)
    return parser


def train_reward_model(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ppo_jax.reward_model",
        description="Train a reward model from preference pairs (docs/reward_models.md). It cannot be resumed.",
        epilog="Every field of the configuration can be set on the command line, values are YAML:\n"
        + help_text(reward_model_config.RewardModelConfig),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with the fields below; the rest are the defaults")
    parser.add_argument("--print_config", action="store_true", help="print the resolved configuration and exit")
    options, rest = parser.parse_known_args(arguments)
    config = reward_model_config.load(options.config, parse_overrides(rest))
    if options.print_config:
        print(config.to_yaml(), end="")
        return
    from ppo_jax import host_memory, processes

    host_memory.keep_freed()
    processes.check_platform("any")
    from ppo_jax.reward_model import build, train

    result = train(build(config))
    print(f"Run: {result.directory}\nReward model, in Hugging Face format: {result.model_directory}")


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
    parser.add_argument("--quiet", action="store_true", help="monitor.live false: plain lines, no live view")
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="print shapes, memory and a time estimate; nothing is trained or written",
    )
    return parser


def help_text(kind: type[Settings] = Config, about: tuple[str, ...] = ("",)) -> str:
    """Every field, or those whose keys begin as one of `about`, with its type, default and meaning."""
    lines = []
    for name, section in sections(kind):
        fields = {key: field for key, field in section.model_fields.items() if f"{name}.{key}".startswith(about)}
        lines += [f"\n{name}:"] if fields else []
        for key, field in fields.items():
            lines.append(
                f"  --{name}.{key} {_type_name(field.annotation)}  [{_shown(field.default)}]\n      {field.description}"
            )
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
        overrides[key] = _yaml_value(text)
    return overrides


def _yaml_value(text: str) -> Any:
    try:
        return yaml.load(text, config_file.StrictLoader)
    except Exception:  # PyYAML lets through whatever its constructors of numbers and dates stumble on
        return text
