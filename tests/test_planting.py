"""Planted bugs: they are seen by everybody who holds the function, and gone after the block, also after an error."""

from functools import partial, wraps

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from parity.mutants import MUTANTS
from parity.planting import Mutant, edited, planted
from parity.properties import PROPERTIES
from ppo_jax.ops import kl
from ppo_jax.ops.kl import k1
from ppo_jax.ops.randomness import rollout_uniforms
from ppo_torch_ref import model as torch_model
from ppo_torch_ref import ops as torch_ops

HERE = __name__


def doubled(x, *, factor=2.0):
    return factor * x


@partial(jax.jit, static_argnames="power")
def compiled(x, *, power):
    """x to a power, by way of another function."""
    return doubled(x) ** power


def logged(function):
    @wraps(function)
    def wrapper(x):
        return function(x), "logged"

    return wrapper


@logged
def wrapped(x):
    return x + 1


class Scale(nn.Module):
    factor: float

    @nn.compact
    def __call__(self, x):
        if self.factor:
            x = x * self.factor
        return x


class Plain:
    def method(self, x):
        return [
            x,
            x + 1,
        ]

    @staticmethod
    def static(x):
        return x + 3

    @classmethod
    def of_class(cls, x):
        return x + 5

    def parent(self):
        return super().__repr__()


def test_everybody_who_holds_the_function_runs_the_mutant_and_afterwards_the_original():
    x, y = jnp.array([3.0]), jnp.array([1.0])
    with planted("ppo_jax.ops.kl:k1", "logprobs - ref_logprobs", "ref_logprobs - logprobs"):
        assert k1(x, y) == kl.k1(x, y) == -2.0
    assert k1(x, y) == kl.k1(x, y) == 2.0


def test_what_was_compiled_before_the_block_or_in_it_is_forgotten():
    jitted, x = jax.jit(k1), jnp.array([3.0])
    assert jitted(x, jnp.zeros(1)) == 3.0
    with planted("ppo_jax.ops.kl:k1", "logprobs - ref_logprobs", "ref_logprobs - logprobs"):
        assert jitted(x, jnp.zeros(1)) == -3.0
    assert jitted(x, jnp.zeros(1)) == 3.0


@pytest.mark.parametrize(
    ("target", "old", "new", "call", "before", "within"),
    [
        ("compiled", "** power", "** (power + 1)", lambda: float(compiled(jnp.float32(1.0), power=2)), 4.0, 8.0),
        ("doubled", "factor * x", "x / factor", lambda: float(compiled(jnp.float32(1.0), power=2)), 4.0, 0.25),
        ("doubled", "factor=2.0", "factor=3.0", lambda: doubled(1.0), 2.0, 3.0),
        ("wrapped", "x + 1", "x - 1", lambda: wrapped(1), (2, "logged"), (0, "logged")),
        ("Scale.__call__", "* self.factor", "+ self.factor", lambda: float(Scale(5.0).apply({}, jnp.ones(()))), 5, 6),
        ("Plain.method", "            x,\n            x + 1", "            x", lambda: Plain().method(1), [1, 2], [1]),
        ("Plain.static", "x + 3", "x", lambda: Plain().static(1), 4, 1),
        ("Plain.of_class", "x + 5", "x", lambda: Plain.of_class(1), 6, 1),
    ],
)
def test_functions_under_wrappers_and_methods_are_reached(target, old, new, call, before, within):
    assert call() == before
    with planted(f"{HERE}:{target}", old, new):
        assert call() == within
    assert call() == before


def test_a_jitted_function_under_the_shape_checker_is_reached():
    key, index = jax.random.PRNGKey(0), jnp.arange(3)
    before = np.asarray(rollout_uniforms(key, index, length=2))
    with planted("ppo_jax.ops.randomness:rollout_uniforms", "fold_in(key, index)", "fold_in(key, 0)"):
        within = np.asarray(rollout_uniforms(key, index, length=2))
    assert len(np.unique(before)) == 6
    assert len(np.unique(within)) == 2
    np.testing.assert_array_equal(rollout_uniforms(key, index, length=2), before)


def test_a_method_of_a_torch_module_is_reached():
    norm, x = torch_model.RMSNorm(2, eps=0.0), torch.tensor([3.0, 4.0])
    before = norm(x)
    with planted("ppo_torch_ref.model:RMSNorm.forward", ".mean(-1, keepdim=True)", ".sum(-1, keepdim=True)"):
        torch.testing.assert_close(norm(x), before / 2**0.5)
    assert torch.equal(norm(x), before)


def test_an_error_inside_of_the_block_still_restores():
    with (
        pytest.raises(ZeroDivisionError),
        planted("ppo_torch_ref.ops:k1", "logprobs - ref_logprobs", "ref_logprobs - logprobs"),
    ):
        raise ZeroDivisionError
    assert torch_ops.k1(torch.tensor(3.0), torch.tensor(1.0)) == 2.0


def test_a_mutant_in_a_mutant_is_refused_and_another_function_is_not():
    edit = ("ppo_torch_ref.ops:k1", "logprobs - ref_logprobs", "ref_logprobs - logprobs")
    with planted(*edit):
        with pytest.raises(ValueError, match="one at a time"), planted(*edit):
            pass
        with planted("ppo_torch_ref.ops:k2", "0.5", "1.0"):
            assert torch_ops.k2(torch.tensor(3.0), torch.tensor(1.0)) == 4.0
        assert torch_ops.k1(torch.tensor(3.0), torch.tensor(1.0)) == -2.0
    assert torch_ops.k1(torch.tensor(3.0), torch.tensor(1.0)) == 2.0


@pytest.mark.parametrize(
    ("target", "old", "error", "message"),
    [
        ("ppo_jax.ops.kl:k1", "not there", ValueError, "occurs 0 times in the source of ppo_jax.ops.kl:k1"),
        ("ppo_jax.ops.kl:k1", "ref_logprobs", ValueError, "expected once"),
        (f"{HERE}:Plain.parent", "repr", ValueError, "closes over __class__"),
        (f"{HERE}:Plain", "x", TypeError, "is a type"),
        (f"{HERE}:HERE", "x", TypeError, "is a str"),
    ],
)
def test_what_cannot_be_planted_is_refused_and_nothing_changes(target, old, error, message):
    with pytest.raises(error, match=message), planted(target, old, "planted"):
        pass
    assert k1(jnp.ones(1), jnp.zeros(1)) == 1.0


def test_every_bug_fits_the_source_that_it_is_planted_in():
    """Most are planted by slow tests alone; a change to the source is told here that it left one behind."""
    stale = []
    for mutant in (*MUTANTS, *(mutant for one in PROPERTIES for mutant in one.mutants)):
        try:
            edited(mutant.target, mutant.old, mutant.new)
        except (AttributeError, ImportError, SyntaxError, TypeError, ValueError) as error:
            stale.append(f"{mutant.bug}: {error}")
    assert not stale, "\n".join(stale)


def test_a_mutant_knows_its_stack():
    assert Mutant("", "ppo_jax.ops.kl:k1", "", "").package == "ppo_jax"
    assert Mutant("", "ppo_torch_ref.ops:k1", "", "").package == "ppo_torch_ref"
    assert Mutant("", "ppo_jax:fine_tune", "", "").package == "ppo_jax"
