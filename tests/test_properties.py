"""The catalogue of properties holds in both stacks on the same generated cases, and every one kills its mutants."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

from parity.properties import PROPERTIES
from parity.properties.rows import STACK_OF, killed_by
from parity.properties.stack import both_stacks


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors this small are faster alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("one", "dtype"), [pytest.param(one, dtype, id=f"{one.name}-{dtype}") for one in PROPERTIES for dtype in one.dtypes]
)
def test_the_property_holds_in_both_stacks(one, dtype):
    stacks = [stack for stack in both_stacks(dtype) if stack.name in one.stacks]

    @settings(max_examples=min(settings().max_examples, one.max_examples or settings().max_examples))
    @given(case=one.cases)
    def holds(case):
        for stack in stacks:
            found = one.check(stack, **case)
            assert found.holds, f"{one.name} of {stack.name} in {dtype}: {found}"

    holds()


@pytest.mark.parametrize("one", PROPERTIES, ids=lambda one: one.name)
def test_every_stack_has_a_mutant(one):
    assert {STACK_OF[mutant.package] for mutant in one.mutants} == {("JAX", "torch").index(name) for name in one.stacks}


def survivors(one, package):
    only = replace(one, mutants=[mutant for mutant in one.mutants if mutant.package == package])
    return [(mutant.bug, mutant.target) for mutant, found in killed_by(only) if found.holds]


@pytest.mark.parametrize("one", PROPERTIES, ids=lambda one: one.name)
def test_the_property_kills_its_mutants_of_the_twin(one):
    assert survivors(one, "ppo_torch_ref") == []


# JAX compiles everything anew around every mutant; `python -m parity.properties` does the same in one table.
@pytest.mark.slow
@pytest.mark.parametrize("one", PROPERTIES, ids=lambda one: one.name)
def test_the_property_kills_its_mutants_of_the_trainer(one):
    assert survivors(one, "ppo_jax") == []


def test_no_two_properties_have_one_name():
    assert len({one.name for one in PROPERTIES}) == len(PROPERTIES)
