"""The controller of the KL's coefficient."""

import json
import math

import numpy as np
from hypothesis import strategies as st

from parity.properties.draws import drawn
from parity.properties.rows import Excess, Property, bug, differ, excess, forbid, worst
from parity.properties.stack import Stack

TARGET_NATS = 6.0


def controller_is_monotone_in_the_kl(stack: Stack, *, coef: float, kls: list[float], horizon: float) -> Excess:
    low, high = (_next_coef(stack, coef, kl, horizon) for kl in sorted(kls))
    # Equal where both are beyond the clip; a controller that never moves is not one.
    moved = _next_coef(stack, coef, 2 * TARGET_NATS, horizon) > _next_coef(stack, coef, 0.0, horizon)
    return worst(excess(low - high), forbid(not moved))


def controller_changes_by_a_fifth_of_the_horizon_at_most(
    stack: Stack, *, coef: float, kls: list[float], horizon: float
) -> Excess:
    changes = [abs(_next_coef(stack, coef, kl, horizon) / float(np.float32(coef)) - 1) for kl in kls]
    return excess(np.array(changes) - 0.2 / horizon, 4 * stack.eps)


def controller_rests_at_its_target(stack: Stack, *, coef: float, horizon: float) -> Excess:
    return differ(_next_coef(stack, coef, TARGET_NATS, horizon), np.float32(coef), 0.0)


def controller_stays_positive_and_survives_json(
    stack: Stack, *, coef: float, kls: list[float], horizon: float
) -> Excess:
    """A checkpoint keeps the coefficient as JSON; a controller that resumes from it goes on to the same bits."""
    straight = resumed = float(np.float32(coef))
    for kl in (*kls, math.inf, 0.0):
        straight, resumed = (_next_coef(stack, value, kl, horizon) for value in (straight, resumed))
        if not math.isfinite(resumed) or resumed <= 0:
            return Excess(math.inf, 0.0)
        resumed = json.loads(json.dumps({"kl_coef": resumed}, allow_nan=False))["kl_coef"]
    return differ(resumed, straight)


def controller_does_not_hide_a_nan(stack: Stack, *, coef: float, horizon: float) -> Excess:
    """Whoever reads the coefficient refuses it (`monitor.invariants`); a finite one would go on."""
    return forbid(not math.isnan(_next_coef(stack, coef, math.nan, horizon)))


def _next_coef(stack: Stack, coef: float, kl: float, horizon: float) -> float:
    return float(stack.next_kl_coef(np.float32(coef), np.float32(kl), target_nats=TARGET_NATS, horizon=horizon))


HORIZONS = st.sampled_from([1.0, 10.0, 1e4])
COEF = {"coef": st.floats(1e-4, 10), "horizon": HORIZONS}
CONTROL = COEF | {"kls": st.lists(st.floats(0, 1e4), min_size=2, max_size=2)}

PROPERTIES = (
    Property(
        controller_is_monotone_in_the_kl,
        drawn(**CONTROL),
        bug("wrong sign", "next_kl_coef", ("seq_kl / target_nats - 1.0", "1.0 - seq_kl / target_nats")),
    ),
    Property(
        controller_changes_by_a_fifth_of_the_horizon_at_most,
        drawn(**CONTROL),
        bug("horizon forgotten", "next_kl_coef", ("error / horizon", "error")),
    ),
    Property(
        controller_rests_at_its_target,
        drawn(**COEF),
        bug("target counted from 0", "next_kl_coef", ("seq_kl / target_nats - 1.0", "seq_kl / target_nats")),
    ),
    Property(
        controller_stays_positive_and_survives_json,
        drawn(**CONTROL),
        bug(
            "growth not clipped", "next_kl_coef", (", -0.2, 0.2)", ", -0.2, jnp.inf)"), (", -0.2, 0.2)", ", min=-0.2)")
        ),
    ),
    Property(
        controller_does_not_hide_a_nan,
        drawn(**COEF),
        bug(
            "NaN made 0",
            "next_kl_coef",
            ("clip(seq_kl", "clip(jnp.nan_to_num(seq_kl)"),
            ("clamp(seq_kl", "clamp(torch.nan_to_num(seq_kl)"),
        ),
    ),
)
