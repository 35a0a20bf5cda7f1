"""95 % confidence intervals of a cell's mean."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean

Z = NormalDist().inv_cdf(0.975)
RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A mean, and where the true one lies with 95 % confidence."""

    mean: float
    low: float
    high: float


def share_right(scores: Sequence[float]) -> Estimate:
    """Of answers that are right or wrong, Wilson's interval; of shares, a bootstrap's."""
    if not set(scores) <= {0.0, 1.0}:
        return bootstrap(scores)
    n, mean = len(scores), fmean(scores)
    centre = (mean + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(mean * (1 - mean) / n + Z**2 / (4 * n**2))
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return Estimate(mean, min(mean, low), max(mean, high))  # rounding may cross the mean


def bootstrap(scores: Sequence[float]) -> Estimate:
    """The percentiles of the means of resampled samples; equal scores give equal intervals."""
    rng = random.Random(0)
    means = sorted(fmean(rng.choices(scores, k=len(scores))) for _ in range(RESAMPLES))
    tail = round(0.025 * RESAMPLES)
    return Estimate(fmean(scores), means[tail], means[-tail - 1])


def perplexity(nats: Sequence[float]) -> Estimate:
    """exp of the mean negative log-probability per token, of samples of equal length."""
    estimate = bootstrap(nats)
    return Estimate(*map(math.exp, (estimate.mean, estimate.low, estimate.high)))
