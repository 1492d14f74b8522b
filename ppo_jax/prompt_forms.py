"""What a row of prompts means: one text, an alpaca instruction, or a conversation."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ppo_jax.config import PromptsConfig
from ppo_jax.prompt_files import TEXT_COLUMN, Row

Message = dict[str, str]  # role and content

# As the instruction-tuned models of this form were trained (Taori et al., "Stanford Alpaca", 2023).
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
# The names of the roles in both layouts of conversations, and what a chat template calls them.
ROLES = {
    "system": "system", "user": "user", "assistant": "assistant", "tool": "tool", "developer": "developer",
    "human": "user", "gpt": "assistant",
}  # fmt: skip
# The columns a conversation is looked for in where `prompts.field` is left at its default.
CONVERSATIONS = ("messages", "conversations")
REFERENCE, MESSAGES = "reference", "messages"


@dataclass(frozen=True)
class Prompt:
    """One prompt before it is encoded."""

    text: str  # as the reward source sees it, and what the model reads without a chat template
    messages: list[Message]  # what a chat template wraps
    columns: dict[str, Any]  # the other values of its row, for reward functions


def missing_column(rows: list[Row], config: PromptsConfig) -> str | None:
    """Why no row can be read, or None: the column that holds the prompts is nowhere."""
    names = dict.fromkeys(name for row in rows for name in row.values)
    wanted = _columns_of(config)
    if not rows or any(name in names for name in wanted):
        return None
    key = "prompts.form alpaca" if config.form == "alpaca" else "prompts.field"
    return f"{key}: {config.path} has no column {' or '.join(map(repr, wanted))}; it has {', '.join(names)}"


def read_prompt(values: dict[str, Any], config: PromptsConfig) -> Prompt:
    """The prompt of a row in the configured form; ValueError says what is wrong with the row."""
    return FORMS[config.form](values, config)


def values_of_text(text: str, config: PromptsConfig) -> dict[str, Any]:
    """A given text as a row of the configured form: it is what the user says."""
    if config.form == "messages":
        return {_columns_of(config)[0]: [{"role": "user", "content": text}]}
    return {_columns_of(config)[0]: text}


def _columns_of(config: PromptsConfig) -> tuple[str, ...]:
    if config.form == "alpaca":
        return ("instruction",)
    if config.path.lower().endswith(".txt"):
        return (TEXT_COLUMN,)
    default = type(config).model_fields["field"].default
    return (config.field, *CONVERSATIONS) if config.form == "messages" and config.field == default else (config.field,)


def _text(values: dict[str, Any], config: PromptsConfig) -> Prompt:
    (column,) = _columns_of(config)
    text = checked_text(values.get(column), f"prompt {column!r}")
    return Prompt(text, [{"role": "user", "content": text}], _without(values, column))


def _alpaca(values: dict[str, Any], config: PromptsConfig) -> Prompt:
    instruction = checked_text(values.get("instruction"), "'instruction'")
    given = values.get("input")
    given = "" if given is None or given == "" else checked_text(given, "'input'")
    message = f"{instruction}\n\n{given}" if given else instruction
    layout = ALPACA_WITH_INPUT if given else ALPACA
    text = message if config.chat_template else layout.format(instruction=instruction, input=given)
    return Prompt(text, [{"role": "user", "content": message}], _without(values, "instruction", "input"))


def _conversation(values: dict[str, Any], config: PromptsConfig) -> Prompt:
    """A conversation up to its last turn of the user; what the assistant said to that becomes `reference`."""
    column = next((name for name in _columns_of(config) if name in values), config.field)
    turns = values.get(column)
    if not isinstance(turns, list | tuple) or not turns:
        raise ValueError(f"{column!r} is {_shown(turns)}, expected a list of messages")
    messages = [_message(turn, number) for number, turn in enumerate(turns, 1)]
    reference = messages.pop()["content"] if messages[-1]["role"] == "assistant" else None
    if not messages or messages[-1]["role"] != "user":
        raise ValueError("ends in no message of the user that could be answered")
    columns = _without(values, column)
    if taken := {REFERENCE, MESSAGES} & set(columns):
        raise ValueError(f"has a column {taken.pop()!r}, which is what the form messages makes; give it another name")
    return Prompt(text_of(messages), messages, columns | {MESSAGES: messages, REFERENCE: reference})


def text_of(messages: list[Message]) -> str:
    """A conversation as one text: its roles are named where there are several turns."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


def is_conversation(value: Any, text: str) -> bool:
    """Whether a value of the column `messages` is what the form messages read `text` from, and no column of the user's
    own that happens to have that name."""
    if not isinstance(value, list) or not value:
        return False
    are_messages = all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in value)
    return are_messages and text_of(value) == text


def _message(turn: Any, number: int) -> Message:
    """{"role": ..., "content": ...} of either layout; the other one says from and value."""
    if not isinstance(turn, dict):
        raise ValueError(f"message {number} is {_shown(turn)}, expected an object")
    who, content = ("from", "value") if "from" in turn else ("role", "content")
    role = turn.get(who)
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"message {number} has {who!r} {_shown(role)}, expected one of {', '.join(ROLES)}")
    return {"role": ROLES[role], "content": checked_text(turn.get(content), f"{content!r} of message {number}")}


def checked_text(text: Any, what: str) -> str:
    """The text, if it is one, is not empty and can be encoded; ValueError begins with `what`."""
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{what} is {_shown(text)}, expected a text that is not empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can write and no tokenizer can read
        raise ValueError(f"{what} is no Unicode text: {error}") from error
    return text


def _without(values: dict[str, Any], *columns: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in columns}


def _shown(value: Any) -> str:
    return f"{value!r:.80}"


FORMS: dict[str, Callable[[dict[str, Any], PromptsConfig], Prompt]] = {
    "text": _text,
    "alpaca": _alpaca,
    "messages": _conversation,
}
