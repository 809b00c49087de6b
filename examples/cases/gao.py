"""Gao's laws: how the gold reward grows and falls with the distance from the reference."""

import math
from typing import NamedTuple

import numpy as np


class GaoFit(NamedTuple):
    """R(d) = d (alpha - slope d) or d (alpha - slope log d): gain in gold at d = sqrt(KL)."""

    alpha: float  # [reward units per nat^1/2]
    slope: float
    r_squared: float  # share of the variance of the gains that the law explains
    law: str  # "linear" or "log"

    @property
    def peak_kl(self) -> float:
        """The KL at which the fitted gain is highest [nats]; nan where it has no peak."""
        if not self.slope > 0 or (self.law == "linear" and not self.alpha > 0):
            return math.nan
        ratio = self.alpha / self.slope
        return (0.5 * ratio if self.law == "linear" else math.exp(ratio - 1)) ** 2

    def __call__(self, distance: np.ndarray) -> np.ndarray:
        """The fitted gain of the gold reward at d = sqrt(KL)."""
        return distance * (self.alpha - self.slope * _bend(distance, self.law))


def fit_gao(kl_seq: np.ndarray, gain: np.ndarray, *, law: str) -> GaoFit:
    """Least squares for R(d) = d (alpha - slope d) or d (alpha - slope log d),  d = sqrt(KL).

    Gao, Schulman & Hilton 2022, arXiv 2210.10760: "linear" for best-of-n, "log" for RL, whose
    slope is infinite at 0: fit it away from 0.

    Args:     kl_seq: (n,) > 0 [nats].
              gain: (n,) gold reward less the reference's.
    Raises:   ValueError: another law, fewer than 3 points, a KL that is not positive, or gains that
                  are all equal or not finite.
    """
    kl_seq, gain = np.asarray(kl_seq, dtype=np.float64), np.asarray(gain, dtype=np.float64)
    positive = ((kl_seq > 0) & (kl_seq < math.inf)).all()
    enough = kl_seq.shape == gain.shape and kl_seq.size >= 3 and positive
    if law not in ("linear", "log") or not enough or not 0 < np.ptp(gain) < math.inf:
        raise ValueError(
            'fit_gao: expected law "linear" or "log" and at least 3 points with kl_seq > 0 and '
            f"gains that differ; got {law!r}, {kl_seq} and {gain}"
        )
    d = np.sqrt(kl_seq)
    columns = np.stack([d, -d * _bend(d, law)], axis=1)
    (alpha, slope), *_ = np.linalg.lstsq(columns, gain, rcond=None)
    rest = ((gain - columns @ (alpha, slope)) ** 2).sum()
    r_squared = 1.0 - rest / ((gain - np.mean(gain)) ** 2).sum()
    return GaoFit(float(alpha), float(slope), float(r_squared), law)


def _bend(distance: np.ndarray, law: str) -> np.ndarray:
    return distance if law == "linear" else np.log(distance)
