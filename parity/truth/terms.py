"""The claims about what else a loss may hold, and about answers that another policy has drawn (H)."""

from typing import Any

from parity.truth import objectives
from parity.truth.objectives import ENTROPY_COEF
from parity.truth.recipes import Recipe, recipe
from parity.truth.training import Claim, of


def of_two(kl_form: str = "k1", estimator: str = "leave_one_out", **choices: Any) -> Recipe:
    return recipe(kl_form, estimator, 2, {name.replace("_", ".", 1): x for name, x in choices.items()})


def drawn_by_another(estimator: str = "leave_one_out", cap: float | None = None) -> Recipe:
    return recipe("k1", estimator, 2, {"update.importance_cap": cap}, drawn_by_another=True)


K3, ENTROPY = of_two("biased_k3_in_loss"), of_two(update_entropy_coef=ENTROPY_COEF)
PER_TOKEN, PER_TOKEN_TO_GO = (
    of_two("k1", estimator, kl_per="token") for estimator in ("leave_one_out", "leave_one_out_to_go")
)
NO_CAP = 1e12
OF_TERMS = (
    Claim("k3 in the loss: the objective", K3),
    Claim("k3 in the loss: KL(ρ ‖ π) of visited states", K3, 1.0, of(objectives.with_reverse_kl_of_states)),
    Claim("k1 per token: KL / length", PER_TOKEN, truth=of(objectives.with_kl_per_token)),
    Claim("k1 per token: (KL − 1) / length", PER_TOKEN, 1.0, of(objectives.with_kl_per_token_less_a_bonus)),
    Claim(
        "k1 per token to go: (KL − 1) / length", PER_TOKEN_TO_GO, truth=of(objectives.with_kl_per_token_less_a_bonus)
    ),
    Claim("entropy bonus: E[Σ H]", ENTROPY, truth=of(objectives.with_entropy)),
    Claim("entropy bonus: Σ H of visited states", ENTROPY, 1.0, of(objectives.with_entropy_of_states)),
    Claim("two clip bounds and a dual clip", of_two(update_clip_eps_high=0.3, update_dual_clip=3.0), 1.0),
    Claim("importance weights, drawn by itself", of_two(update_importance_cap=1.0), 1.0),
    Claim("drawn by another, uncorrected", drawn_by_another()),
    Claim("the same, weights per token, uncapped", drawn_by_another(cap=NO_CAP)),
    Claim("the same, uncapped, to go", drawn_by_another("leave_one_out_to_go", cap=NO_CAP)),
    Claim("the same, capped at 2", drawn_by_another(cap=2.0)),
)
