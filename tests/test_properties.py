"""The catalogue of properties holds in both stacks on the same generated cases, and every one kills its mutants."""

import pytest
import torch
from hypothesis import given, settings

from parity.properties import PROPERTIES
from parity.properties.rows import killed_by
from parity.properties.stack import both_stacks


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors this small are faster alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("one", PROPERTIES, ids=lambda one: one.name)
def test_the_property_holds_in_both_stacks(one, dtype):
    if dtype not in one.dtypes:
        pytest.skip(f"this is about {one.dtypes[0]}")
    stacks = [stack for stack in both_stacks(dtype) if stack.name in one.stacks]

    @settings(max_examples=min(settings().max_examples, one.max_examples or settings().max_examples))
    @given(case=one.cases)
    def holds(case):
        for stack in stacks:
            found = one.check(stack, **case)
            assert found.holds, f"{one.name} of {stack.name} in {dtype}: {found}"

    holds()


@pytest.mark.parametrize("one", PROPERTIES, ids=lambda one: one.name)
def test_the_property_kills_its_mutants(one):
    survivors = [(mutant.bug, mutant.target) for mutant, found in killed_by(one) if found.holds]
    assert survivors == []
    assert {mutant.package for mutant in one.mutants} >= {
        {"JAX": "ppo_jax", "torch": "ppo_torch_ref"}[name] for name in one.stacks
    }


def test_no_two_properties_have_one_name():
    assert len({one.name for one in PROPERTIES}) == len(PROPERTIES)
