"""How far an observed share may lie from the true one."""

from statistics import NormalDist

CONFIDENCE = 0.95


def wilson_interval(share: float, count: int, *, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Interval of a true share of which `share` was observed in `count` independent trials; (0, 1) of none.

    (p + z²/2n ± z √(p(1 − p)/n + z²/4n²)) / (1 + z²/n) with z = Φ⁻¹((1 + confidence) / 2): unlike p ± z √(p(1 − p)/n)
    it stays within [0, 1] and has a width where p is 0 or 1. Source: Wilson, "Probable Inference, the Law of
    Succession, and Statistical Inference", 1927.
    """
    if count == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    center, scale = share + z**2 / (2 * count), 1 + z**2 / count
    half = z * (share * (1 - share) / count + z**2 / (4 * count**2)) ** 0.5
    return max(0.0, (center - half) / scale), min(1.0, (center + half) / scale)  # rounding may leave [0, 1]
