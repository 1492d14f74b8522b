"""Bugs on purpose. A suite that stays green beside one of them proves nothing; here each names what must see it."""

from parity.mutants import formulas, model, rest, training

MUTANTS = (*model.MUTANTS, *formulas.MUTANTS, *training.MUTANTS, *rest.MUTANTS)
