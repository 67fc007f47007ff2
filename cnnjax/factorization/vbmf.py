"""Ranks by empirical variational Bayes matrix factorization (global analytic solution)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy.optimize
from jaxtyping import Float

from cnnjax.factorization.matrix import check_finite
from cnnjax.typing import AnyArray


class VBMFRank(NamedTuple):
    """What `evbmf_rank` finds.

    Attributes:
      rank: number of singular values above the threshold (may be 0: the matrix looks like noise).
      sigma2: noise variance.
      shrunk: the shrunk singular values of the kept components.
      at_bound: the noise variance sits on its lower bound or the rank on its largest possible
        value: the model does not fit, and the rank is not to be trusted.
    """

    rank: int
    sigma2: float
    shrunk: np.ndarray
    at_bound: bool


def _phi(z: float) -> float:
    return math.log1p(z) / z - 0.5


def threshold_tau(alpha: float) -> float:
    """The root t of ``Phi(t) + Phi(t / alpha) = 0``, ``Phi(z) = log(1 + z)/z - 1/2``."""
    low = 1e-8 * math.sqrt(alpha)
    root = scipy.optimize.brentq(lambda t: _phi(t) + _phi(t / alpha), low, 100.0, xtol=1e-14)
    return float(np.asarray(root))


def _free_energy(
    squares: np.ndarray, rows: int, columns: int, xbar: float, alpha: float
) -> Callable[[float], float]:
    """F as a function of log sigma^2 (natural logarithm)."""

    def energy(log_sigma2: float) -> float:
        x = squares / (columns * math.exp(log_sigma2))
        small = x[x <= xbar]
        small = small[small > 0]
        large = x[x > xbar]
        b = large - (1 + alpha)
        tau = (b + np.sqrt(np.maximum(b**2 - 4 * alpha, 0))) / 2
        return float(
            np.sum(small - np.log(small))
            + np.sum(large - tau + np.log((tau + 1) / large) + alpha * np.log(tau / alpha + 1))
        )

    return energy


def evbmf_rank(
    matrix: Float[AnyArray, "l m"], *, sigma2: float | None = None, search: str = "brent"
) -> VBMFRank:
    """Rank of a noisy matrix by the global analytic solution of empirical VBMF.

    Runs on the host in float64: the tail of the spectrum decides the noise variance, and a rank is
    a number that the program's shapes depend on.

    Args:
      matrix: (l, m); transposed if l > m.
      sigma2: noise variance, if known; None estimates it.
      search: how the noise variance is found: ``"brent"`` (one bounded search, as circulated
        code does) or ``"global"`` (a grid of 200 points, then refinement; on real kernels the
        free energy has several minima and the two can differ).

    Raises:
      ValueError: for non-finite entries, another search, or sigma2 <= 0.

    Reference:
      Nakajima, Sugiyama, Babacan, Tomioka, "Global analytic solution of fully-observed variational
      Bayesian matrix factorization", JMLR 14, 2013; for kernels Kim et al., ICLR 2016,
      arXiv 1511.06530.
    """
    if search not in ("brent", "global"):
        raise ValueError(f"search is {search!r}; expected 'brent' or 'global'")
    if sigma2 is not None and not sigma2 > 0:
        raise ValueError(f"sigma2 is {sigma2}; a noise variance is positive")
    check_finite(matrix, "matrix")
    y = np.asarray(matrix, np.float64)
    if y.shape[0] > y.shape[1]:
        y = y.T
    rows, columns = y.shape
    s = np.linalg.svd(y, compute_uv=False)
    squares = s**2
    if squares.sum() == 0:
        return VBMFRank(0, 0.0, np.zeros(0), False)
    alpha = rows / columns
    tau = threshold_tau(alpha)
    xbar = (1 + tau) * (1 + alpha / tau)
    at_bound = False
    largest = min(math.ceil(rows / (1 + alpha)) - 1, rows)
    if sigma2 is None:
        tail = squares[largest:]
        upper = squares.sum() / (rows * columns)
        lower = max(tail[0] / (columns * xbar), tail.mean() / columns) if len(tail) else 0.0
        lower = min(max(lower, 1e-12 * upper), upper)
        low, high = math.log(lower), math.log(upper)
        log_sigma2 = low
        if high > low:
            energy = _free_energy(squares, rows, columns, xbar, alpha)
            log_sigma2 = _minimise(energy, low, high, search)
        sigma2 = math.exp(log_sigma2)
        at_bound = log_sigma2 - low < 1e-3 * max(high - low, 1e-12)
    threshold = math.sqrt(columns * sigma2 * xbar)
    kept = s[s > threshold]
    ratio = (rows + columns) * sigma2 / kept**2
    inside = np.maximum((1 - ratio) ** 2 - 4 * rows * columns * sigma2**2 / kept**4, 0)
    shrunk = kept / 2 * (1 - ratio + np.sqrt(inside))
    return VBMFRank(len(kept), sigma2, shrunk, at_bound or len(kept) >= max(largest, 1))


def _minimise(energy: Callable[[float], float], low: float, high: float, search: str) -> float:
    def bounded(a: float, b: float) -> float:
        found = scipy.optimize.minimize_scalar(
            energy, bounds=(a, b), method="bounded", options={"xatol": 1e-6}
        )
        return float(found.x)

    if search == "brent":
        return bounded(low, high)
    grid = np.linspace(low, high, 200)
    values = [energy(g) for g in grid]
    best = int(np.argmin(values))
    candidate = bounded(grid[max(best - 1, 0)], grid[min(best + 1, 199)])
    # the refinement must not lose to the grid itself, ends included
    return candidate if energy(candidate) <= values[best] else float(grid[best])


def tucker2_ranks(
    kernel: Float[AnyArray, "kh kw i o"],
    *,
    search: str = "brent",
    floor: float = 0.0,
    weaken: float = 0.0,
) -> tuple[int, int]:
    """Tucker-2 ranks (input, output) by EVBMF of the two unfoldings.

    Args:
      kernel: (kh, kw, i, o).
      search: see `evbmf_rank`.
      floor: smallest rank as a share of the mode's size; EVBMF is very aggressive on compact nets.
      weaken: moves both ranks this share of the way towards full rank, in [0, 1].

    Raises:
      ValueError: for floor or weaken outside [0, 1].
    """
    for name, value in (("floor", floor), ("weaken", weaken)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}; expected a share in [0, 1]")
    k = np.asarray(kernel, np.float64)
    out = []
    for mode in (2, 3):
        n = k.shape[mode]
        found = evbmf_rank(np.moveaxis(k, mode, 0).reshape(n, -1), search=search).rank
        found = max(found, 1, math.ceil(floor * n))
        out.append(min(n, round(found + weaken * (n - found))))
    return out[0], out[1]
