"""Strict numbers for every test: no silent dtype or rank promotion, shapes checked at run time, warnings are errors.

Expected values come from loops in float64 NumPy, from torch or from transformers; never from the code under test.
"""

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The commands that tests run keep what they compile here, not in the cache of whoever runs the tests.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="ppo_jax_tests_")

import flax.struct
import jax
import jaxtyping
import pytest
from hypothesis import HealthCheck, settings

import tests.typecheck  # noqa: F401, the hook below finds it by name

atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Tests compile a hundred small programs and run each for milliseconds.
jax.config.update("jax_disable_most_optimizations", True)


def _pytree_dataclass(cls, *, _make=flax.struct.dataclass, **options):
    """A struct.dataclass whose constructor is not shape-checked: JAX rebuilds pytrees of specs, flags and rows."""
    made = _make(cls, **options)
    made.__no_type_check__ = True
    return made


flax.struct.dataclass = _pytree_dataclass
# Before the first import of ppo_jax: every annotated function of it checks its shapes and types in the tests.
jaxtyping.install_import_hook("ppo_jax", "tests.typecheck.check")

from parity.models import hf_model  # noqa: E402
from ppo_jax.models import hf_io  # noqa: E402
from tests.tiny import make_model  # noqa: E402

_QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("default", max_examples=25, derandomize=bool(os.environ.get("CI")), **_QUIET)
settings.register_profile("thorough", max_examples=400, **_QUIET)
settings.load_profile(os.environ.get("PPO_JAX_HYPOTHESIS", "default"))


MEMORY_MAPS = Path("/proc/self/maps")


@pytest.fixture(autouse=True, scope="module")
def few_memory_maps():
    """Compiled programs are forgotten between modules once there are many: each is about twenty memory maps, of which
    Linux grants a process 65,530. A worker of 6.6 GB died of a segmentation fault in XLA's compiler without this."""
    yield
    if MEMORY_MAPS.exists() and MEMORY_MAPS.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()


class Tiny(NamedTuple):
    model: hf_io.ModelDirectory
    params: dict


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """Directory of a random Llama, see `tiny`."""
    return make_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny(tiny_model) -> Tiny:
    """The same model, loaded."""
    model = hf_io.open_model(str(tiny_model))
    return Tiny(model, hf_io.load_params(model.path, model.config, model.spec))


@pytest.fixture(scope="session")
def tokenizer():
    """A word-level tokenizer of 37 words with the special tokens of `parity.models`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(34))])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


@pytest.fixture(scope="session")
def hf_directory(tmp_path_factory, tokenizer):
    """(transformers model, its saved directory) of a name in `parity.models.MODELS`, made once."""

    @functools.cache
    def make(name):
        model, directory = hf_model(name), tmp_path_factory.mktemp(name)
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        return model, directory

    return make
