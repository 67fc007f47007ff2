"""Neuron selection: which hidden units of a teacher are worth imitating (MobileID)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cnnjax.typing import AnyArray

Profile = Float[AnyArray, "k a"]


@jax.jit
def neuron_profile(
    activations: Float[AnyArray, "n k"], attributes: Bool[AnyArray, "n a"]
) -> Float[Array, "k a"]:
    """Balanced accuracy of each neuron as a one-feature classifier of each attribute.

    ``x[i, j] = (TPR + TNR) / 2`` at the threshold that is best on these samples, either side
    counting as positive, so values lie in [0.5, 1]. Attributes that are constant give 0.5.

    Args:
      activations: (n, k).
      attributes: (n, a) booleans.

    Reference:
      Luo et al., "Face model compression by distilling knowledge from neurons", AAAI 2016.
    """
    order = jnp.argsort(activations, axis=0)
    values = jnp.take_along_axis(jnp.asarray(activations, jnp.float32), order, axis=0)
    positive = jnp.asarray(attributes, jnp.float32)
    totals = positive.sum(0)
    negatives = positive.shape[0] - totals
    # a threshold can't separate equal activations: only ends of runs count
    run_end = jnp.concatenate([values[1:] != values[:-1], jnp.ones((1, values.shape[1]), bool)])

    def one(order, run_end):
        below = jnp.cumsum(positive[order], axis=0)
        count = jnp.arange(1, positive.shape[0] + 1)[:, None]
        tpr = 1 - below / jnp.maximum(totals, 1)  # positive = above the threshold
        tnr = (count - below) / jnp.maximum(negatives, 1)
        balanced = jnp.where(run_end[:, None], 0.5 * (tpr + tnr), 0.5)
        best = jnp.maximum(balanced.max(0), 1 - balanced.min(0))
        return jnp.where((totals > 0) & (negatives > 0), best, 0.5)

    return jax.vmap(one, in_axes=1)(order, run_end)


@jax.jit
def unary_cost(
    profile: Profile, identity: Bool[AnyArray, " a"], floor: float = 1e-3
) -> Float[Array, " k"]:
    """``f_i``: how much more selective a neuron is to nuisance than to identity attributes.

    ``(max_NA x - mean_NA x) / max(floor, max_IA x - mean_IA x)``.
    """
    x = jnp.asarray(profile, jnp.float32)
    identity = jnp.asarray(identity, bool)

    def peak(mask):
        mean = jnp.sum(jnp.where(mask, x, 0.0), -1) / jnp.maximum(mask.sum(), 1)
        return jnp.max(jnp.where(mask, x, -jnp.inf), -1) - mean

    return peak(~identity) / jnp.maximum(peak(identity), floor)


@jax.jit
def redundancy(profile: Profile) -> Float[Array, "k k"]:
    """``Psi_ij = exp(-||x_i - x_j||^2 / 2)``, zero on the diagonal."""
    x = jnp.asarray(profile, jnp.float32)
    squares = jnp.sum((x[:, None] - x[None]) ** 2, axis=-1)
    return jnp.exp(-0.5 * squares) * (1 - jnp.eye(x.shape[0]))


@functools.partial(jax.jit, static_argnames="steps")
def mean_field(
    cost: Float[AnyArray, " k"],
    pair: Float[AnyArray, "k k"],
    tau: float | Array,
    lam: float | Array,
    theta: float | Array,
    steps: int = 200,
) -> Float[Array, " k"]:
    """Damped mean-field marginals of ``E(y) = sum (f - tau) y + lam sum_{i != j} Psi y_i y_j``.

    Update: ``q <- (q + sigmoid(-(f - tau + 2 lam Psi q) / theta)) / 2``.
    """

    def update(q, _):
        field = cost - tau + 2 * lam * jnp.matmul(pair, q, precision="highest")
        return 0.5 * (q + jax.nn.sigmoid(-field / theta)), None

    start = jnp.full(cost.shape, 0.5, jnp.float32)
    return jax.lax.scan(update, start, None, length=steps)[0]


def select_neurons(
    profile: Profile,
    identity: Bool[AnyArray, " a"],
    count: int,
    *,
    lam: float = 0.01,
    theta: float = 0.05,
) -> tuple[Int[Array, " count"], Float[Array, " k"]]:
    """The ``count`` neurons of lowest energy by mean field.

    Every term of the energy is non-negative, so a reward ``tau`` for each selected neuron is
    bisected until ``count`` neurons have a marginal above one half; where neurons tie exactly,
    the highest marginals (then the lowest indices) fill up.

    Args:
      profile: (k, a) from `neuron_profile`; drop neurons that never fire first.
      identity: (a,) True for identity attributes, False for nuisance ones (at least one each).
      count: how many neurons to keep, 1 to k.
      lam: weight of redundancy between pairs.
      theta: temperature of the mean field.

    Returns:
      (indices in ascending order, marginals q).

    Raises:
      ValueError: for a count out of range, or attributes all of one kind.

    Reference:
      Luo et al., AAAI 2016. The paper does not say how it avoids the empty set; the reward is ours.
    """
    k = profile.shape[0]
    if not 1 <= count <= k:
        raise ValueError(f"count is {count}; expected 1 to {k}, the number of neurons")
    if identity.shape != (profile.shape[1],):
        raise ValueError(f"identity has shape {identity.shape}; expected ({profile.shape[1]},)")
    if bool(identity.all()) or not bool(identity.any()):
        raise ValueError("identity must mark at least one attribute True and at least one False")
    return _select(profile, identity, count, lam, theta)


@functools.partial(jax.jit, static_argnames="count")
def _select(profile, identity, count, lam, theta):
    cost = unary_cost(profile, identity)
    pair = redundancy(profile)
    low = cost.min() - 20 * theta - 1.0
    high = cost.max() + 2 * lam * pair.sum(-1).max() + 20 * theta + 1.0

    def bisect(bounds, _):
        low, high = bounds
        middle = 0.5 * (low + high)
        enough = jnp.sum(mean_field(cost, pair, middle, lam, theta) > 0.5) >= count
        return (jnp.where(enough, low, middle), jnp.where(enough, middle, high)), None

    (_, high), _ = jax.lax.scan(bisect, (low, high), None, length=40)
    q = mean_field(cost, pair, high, lam, theta)
    # stable sort on -q: ties go to the lower index
    chosen = jnp.argsort(-q, stable=True)[:count]
    return jnp.sort(chosen), q


@jax.jit
def neuron_mimic(
    student: Float[AnyArray, "n m"],
    teacher: Float[AnyArray, "n k"],
    selected: Int[AnyArray, " m"],
    scale: Float[AnyArray, " m"] | None = None,
) -> Float[Array, ""]:
    """``1/(2n) sum ||teacher[:, selected] / scale - student||^2``.

    Args:
      student: (n, m) outputs.
      teacher: (n, k) hidden activations.
      selected: (m,) indices from `select_neurons`.
      scale: (m,) standard deviations of the selected neurons; None leaves them as they are.
    """
    target = jnp.asarray(teacher, jnp.float32)[:, selected]
    if scale is not None:
        target = target / jnp.maximum(scale, 1e-6)
    difference = jnp.asarray(student, jnp.float32) - jax.lax.stop_gradient(target)
    return 0.5 * jnp.mean(jnp.sum(difference**2, axis=-1))
