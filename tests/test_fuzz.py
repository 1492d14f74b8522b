"""Whatever bytes a prompt file, a configuration or a weight file holds: it is read, or one `UserError` says why not.

No other exception, no case of more than `CPU_SECONDS`, and no more than `MEMORY` bytes of address space beyond what
the process has before (a `MemoryError` is another exception, and so fails). Files are random, or right ones with bits
flipped and parts cut out, doubled or written over; `-m slow` runs 10,000 cases of each.
"""

import json
import resource
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from flax.traverse_util import flatten_dict
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ppo_jax import cli, config_file, generate_config
from ppo_jax.config import Config, PromptsConfig, known_keys
from ppo_jax.errors import UserError
from ppo_jax.models import hf_io
from ppo_jax.prompts import load_prompts
from tests.tiny import make_tokenizer

MEMORY = 512 * 2**20
CPU_SECONDS = 60
MANY = 10_000


def too_long(*_):
    raise TimeoutError(f"a case took more than {CPU_SECONDS} seconds of the processor")


def result_of(read):
    """What is read, or the `UserError`. A hang is told by the processor's time: a busy machine stops anything."""
    before, memory = signal.signal(signal.SIGPROF, too_long), resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, memory[1]))
    try:
        return read()
    except UserError as error:
        return error
    finally:
        resource.setrlimit(resource.RLIMIT_AS, memory)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@st.composite
def damaged(draw, valid, pieces=(b"\x00", b"\xff", b"\n")):
    """Bytes of one of the `valid` files after one to four accidents."""
    data = bytearray(draw(st.sampled_from(valid)))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 40)))
        part = data[start:end]
        match draw(st.sampled_from(["flip", "cut off", "cut out", "double", "write over", "put in", "move"])):
            case "flip" if part:
                part[0] ^= 1 << draw(st.integers(0, 7))
                data[start:end] = part
            case "cut off":
                del data[start:]
            case "cut out":
                del data[start:end]
            case "double":
                data[start:start] = part * draw(st.integers(1, 30))
            case "write over":
                data[start:end] = draw(st.binary(min_size=len(part), max_size=len(part)))
            case "put in":
                data[start:start] = draw(st.sampled_from(pieces))
            case "move":
                del data[start:end]
                where = draw(st.integers(0, len(data)))
                data[where:where] = part
    return bytes(data)


# ------------------------------------------------------------------------------------------------------------- prompts

ROWS = [
    {"prompt": "the soup was", "label": 1, "instruction": "say", "input": "good", "messages": [
        {"role": "system", "content": "be good"}, {"role": "user", "content": "hi é"},
        {"role": "assistant", "content": "a"}]},
    {"prompt": "a bad \u2028 night", "label": None, "instruction": "do", "input": "", "messages": [
        {"role": "user", "content": "why"}]},
]  # fmt: skip


def parquet_bytes(rows):
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


PROMPT_FILES = {
    "jsonl": "\n".join(map(json.dumps, ROWS)).encode(),
    "json": json.dumps(ROWS, ensure_ascii=False).encode(),
    "csv": b'prompt,label,instruction\n"the ""soup"", was",1,say\r\na bad night,,do\n',
    "txt": b"the soup was\r\n\na bad night\n",
    "parquet": parquet_bytes(ROWS),
}
HOSTILE_JSON = (
    b"[" * 100_000,
    b'{"prompt":' * 3000,
    b"1" * 5000,
    b'"\\ud800"',
    b"NaN",
    b"1e999",
    b"\xef\xbb\xbf",
    b"\x00",
)


@st.composite
def prompt_cases(draw):
    ending = draw(st.sampled_from(list(PROMPT_FILES)))
    content = draw(damaged([PROMPT_FILES[ending]], HOSTILE_JSON) | st.binary(max_size=200))
    return ending, content, draw(st.sampled_from(["text", "alpaca", "messages"]))


@pytest.fixture(scope="module")
def tokenizer():
    pyarrow.parquet.read_table(pyarrow.BufferReader(PROMPT_FILES["parquet"]))  # which takes its pools of memory
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    return tokenizer


def read_prompts(directory, tokenizer, case):
    ending, content, form = case
    file = directory / f"p.{ending}"
    file.write_bytes(content)
    config = PromptsConfig(path=str(file), form=form, chat_template=form == "messages", max_tokens=4096)
    prompts = result_of(lambda: load_prompts(config, tokenizer, seed=0))
    if isinstance(prompts, UserError):
        assert str(file) in str(prompts)
        return
    assert prompts.texts
    assert all(0 < len(tokens) <= 4096 for tokens in prompts.encoded)
    assert all(len(values) == len(prompts.texts) for values in prompts.columns.values())


@given(case=prompt_cases())
@settings(max_examples=60)
@example(case=("csv", b"a," * 400_000, "text"))
def test_any_file_of_prompts_is_read_or_refused(tmp_path_factory, tokenizer, case):
    read_prompts(tmp_path_factory.getbasetemp(), tokenizer, case)


@pytest.mark.slow
@given(case=prompt_cases())
@settings(max_examples=MANY)
def test_any_file_of_prompts_is_read_or_refused_many_times(tmp_path_factory, tokenizer, case):
    read_prompts(tmp_path_factory.getbasetemp(), tokenizer, case)


# ------------------------------------------------------------------------------------------------------- configuration

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGE_BOMB = "a: &a {x: 1}\n" + "".join(
    f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 9)}]}}\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
PIECES = (
    MERGE_BOMB,
    *("&a [*a]", "&a {x: *a}", "*a", "<<: *a\n", "? [a]\n: b\n", "{[]: 1}"),
    *("[" * 2000, "{" * 2000, "- " * 2000, "{a: " * 600),
    *("1" * 5000, "0x" + "f" * 5000, "1e999", ".nan", "-.inf", "1_0", "0b2", "08", "1:99:99"),
    *(
        "2001-99-99",
        "2001-01-01 99:00:00",
        "!!binary é",
        "!!int x",
        "!!float x",
        "!!timestamp x",
        "!!bool 7",
        "!!null 1",
    ),
    *("!!set {a}", "!!omap [a]", "!!pairs [a]", "!!python/object/apply:os.getpid []"),
    *("%YAML 9.9\n---\n", "---\n", "\t", "\x00", "|9\n", ">", "'", "# ", BOMB, f"run: {{{BOMB}}}"),
    *("update:\n", "rollout: []\n", "kl: 3\n", "1: 2\n", "null: {}\n", "reward: {weights: {1: 2}}\n"),
)
CONFIGS = [file.read_bytes() for file in sorted((Path(__file__).parent.parent / "configs").rglob("*.yaml"))]
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10) | st.sampled_from(PIECES)
    | st.dates() | st.binary(max_size=4) | st.just(10**400)
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
KEYS = st.sampled_from([key for key, _ in known_keys()]) | st.sampled_from(
    ["", ".", "run.", ".seed", "run", "kl.coef.x"]
)
SECTIONS = st.dictionaries(
    st.sampled_from(list(Config.model_fields)) | st.text(max_size=5),
    VALUES | st.dictionaries(KEYS.map(lambda key: key.partition(".")[2]), VALUES, max_size=4),
    max_size=4,
)
WRITTEN = SECTIONS.map(lambda values: yaml.dump(values).encode(errors="surrogatepass"))
CONFIG_FILES = damaged(CONFIGS, [piece.encode() for piece in PIECES]) | WRITTEN | st.binary(max_size=80)
OVERRIDES = st.lists(
    st.tuples(KEYS, st.text(max_size=12) | st.sampled_from(PIECES) | st.integers().map(str)), max_size=3
)


def read_config(directory, content, overrides):
    file = directory / "c.yaml"
    file.write_bytes(content)
    words = [word for key, text in overrides for word in (f"--{key}", text)]
    for load in (
        lambda: config_file.load(file, cli.parse_overrides(words)),
        lambda: generate_config.load(file, {}, scored=True),
    ):
        config = result_of(load)
        if isinstance(config, Config):
            assert type(config).model_validate(yaml.safe_load(config.to_yaml())) == config
        else:
            assert len(str(config)) < 100_000


@given(content=CONFIG_FILES, overrides=OVERRIDES)
@settings(max_examples=60)
def test_any_configuration_is_read_or_refused(tmp_path_factory, content, overrides):
    read_config(tmp_path_factory.getbasetemp(), content, overrides)


@pytest.mark.slow
@given(content=CONFIG_FILES, overrides=OVERRIDES)
@settings(max_examples=MANY)
def test_any_configuration_is_read_or_refused_many_times(tmp_path_factory, content, overrides):
    read_config(tmp_path_factory.getbasetemp(), content, overrides)


@pytest.mark.parametrize("piece", PIECES)
def test_every_hostile_piece_of_yaml_is_read_or_refused(tmp_path, piece):
    read_config(tmp_path, f"run:\n  seed: {piece}".encode(), [("reward.weights", piece)])
    read_config(tmp_path, piece.encode(), [])


# --------------------------------------------------------------------------------------------------------- safetensors

ENORMOUS = (-1, 0, 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30)
DTYPES = ("F32", "F16", "BF16", "F64", "F8_E4M3", "F8_E5M2", "F4", "I64", "I8", "U16", "BOOL", "C64", "X", "", None, 3)
ODD = st.sampled_from([*ENORMOUS, None, "x", 1.5, [], {}, True])


@st.composite
def weight_files(draw, valid):
    """A safetensors file whose header, length or data are not what they were."""
    length = int.from_bytes(valid[:8], "little")
    header, data = json.loads(valid[8 : 8 + length]), valid[8 + length :]
    names, changes = [name for name in header if name != "__metadata__"], draw(st.integers(0, 3))
    for _ in range(changes):
        entry = header.get(draw(st.sampled_from(names)), {})
        match draw(st.sampled_from(["dtype", "shape", "offsets", "swap", "drop", "name", "metadata", "extra", "odd"])):
            case "dtype":
                entry["dtype"] = draw(st.sampled_from(DTYPES))
            case "shape":
                entry["shape"] = draw(st.lists(ODD, max_size=3))
            case "offsets":
                near = st.integers(0, len(data) + 8)
                entry["data_offsets"] = draw(st.lists(near | ODD, min_size=1, max_size=3))
            case "swap":
                other = header.get(draw(st.sampled_from(names)), {})
                entry["data_offsets"], other["data_offsets"] = other.get("data_offsets"), entry.get("data_offsets")
            case "drop":
                header.pop(draw(st.sampled_from(names)), None)
            case "name":
                header[draw(st.text(max_size=5))] = header.pop(draw(st.sampled_from(names)), {})
            case "metadata":
                header["__metadata__"] = draw(ODD | st.dictionaries(st.text(max_size=3), ODD, max_size=2))
            case "extra":
                header[draw(st.text(max_size=5))] = draw(ODD)
            case "odd":
                entry[draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))] = draw(ODD)
    text = json.dumps(header).encode()
    match draw(st.sampled_from(["as it is"] * 4 + ["twice", "deep", "length", "damaged"])):
        case "twice":
            text = text[:-1] + b", " + text[1:]
        case "deep":
            text = b'{"__metadata__": ' + b'{"a":' * draw(st.sampled_from([10, 200, 100_000])) + text
    written = len(text).to_bytes(8, "little") + text + data
    if draw(st.booleans()):
        size = draw(
            st.integers(0, len(written) + 9) | st.sampled_from([2**31, 2**32, 2**40, 2**63, 2**64 - 1, 10**8 + 1])
        )
        written = size.to_bytes(8, "little") + written[8:] if draw(st.booleans()) else written
    return draw(damaged([written])) if draw(st.booleans()) else written


def read_weights(directory, model, content):
    (directory / "model.safetensors").write_bytes(content)
    with np.errstate(all="ignore"):  # a flipped bit may make a number infinite
        read = partial(hf_io.load_params, directory, model.config, model.spec, place=lambda path, value: value)
        params = result_of(read)
    if not isinstance(params, UserError):
        shapes = {path: leaf.shape for path, leaf in flatten_dict(params, sep="/").items()}
        assert shapes == hf_io.param_shapes(model.spec)


@pytest.fixture(scope="module")
def weights(tiny, tmp_path_factory):
    """(directory to write to, the model, the bytes of its file)."""
    return tmp_path_factory.mktemp("weights"), tiny.model, (tiny.model.path / "model.safetensors").read_bytes()


@given(data=st.data())
@settings(max_examples=60)
def test_any_file_of_weights_is_read_or_refused(weights, data):
    directory, model, valid = weights
    read_weights(directory, model, data.draw(weight_files(valid)))


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=MANY)
def test_any_file_of_weights_is_read_or_refused_many_times(weights, data):
    directory, model, valid = weights
    read_weights(directory, model, data.draw(weight_files(valid)))
