"""Stochastic gates: hard-concrete l0 regularization.

Louizos, Welling, Kingma, "Learning sparse neural networks through L0 regularization", ICLR 2018,
arXiv 1712.01312. Each gate multiplies a group of weights; how often it is not zero is a smooth
function of its ``log_alpha``, and is what the penalty counts.

Inside `cnnjax.training` the trained pytree is ``{"params": ..., "gates": ...}``::

    trained = gates.gated(params, {"fc1/kernel": "channel", "fc2/kernel": "channel"}, key=key)
    hooks = training.Hooks(
        reparam=gates.reparam(spec), penalty=gates.penalty(spec, strength=0.1 / n)
    )
    network, state = training.create_state(model, optimizer, params=trained)
    ...
    params, mask = gates.fold(state.params, spec)   # gates of 0 and their weights are gone
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cnnjax import tree
from cnnjax.errors import did_you_mean
from cnnjax.pruning import granularity as grain

PyTree = Any
LOG_ALPHA_BOUNDS = (math.log(1e-2), math.log(1e2))


@dataclasses.dataclass(frozen=True)
class HardConcrete:
    """The distribution's numbers (the paper's defaults).

    Attributes:
      beta: temperature of the binary concrete.
      gamma: lower end of the stretched interval, below 0.
      zeta: upper end, above 1.
    """

    beta: float = 2.0 / 3.0
    gamma: float = -0.1
    zeta: float = 1.1

    def __post_init__(self) -> None:
        if not (self.beta > 0 and self.gamma < 0 and self.zeta > 1):
            raise ValueError(
                f"need beta > 0, gamma < 0 and zeta > 1, got {self.beta}, {self.gamma}, {self.zeta}"
            )

    @property
    def shift(self) -> float:
        """``P(z != 0) = sigmoid(log_alpha + shift)`` and ``P(z = 1) = sigmoid(log_alpha - shift)``
        (for the symmetric interval of the defaults)."""
        return -self.beta * math.log(-self.gamma / self.zeta)


DEFAULT = HardConcrete()


def sample(
    key: jax.Array, log_alpha: Float[Array, ...], form: HardConcrete = DEFAULT
) -> Float[Array, ...]:
    """One draw of every gate, in [0, 1]; differentiable in ``log_alpha`` (zero where clamped)."""
    # 24 random bits: u is never 0 or 1 in float32
    tiny = 2.0**-24
    u = jax.random.uniform(key, log_alpha.shape, jnp.float32, minval=tiny, maxval=1 - tiny)
    u = u.astype(log_alpha.dtype)
    s = jax.nn.sigmoid((jnp.log(u) - jnp.log1p(-u) + log_alpha) / form.beta)
    return jnp.clip(s * (form.zeta - form.gamma) + form.gamma, 0, 1)


def eval_gate(log_alpha: Float[Array, ...], form: HardConcrete = DEFAULT) -> Float[Array, ...]:
    """The deterministic gate of evaluation: exactly 0 iff ``log_alpha <= -log 11`` (defaults)."""
    s = jax.nn.sigmoid(log_alpha)
    return jnp.clip(s * (form.zeta - form.gamma) + form.gamma, 0, 1)


test_gate = eval_gate  # the paper's name


def active_probability(
    log_alpha: Float[Array, ...], form: HardConcrete = DEFAULT
) -> Float[Array, ...]:
    """``P(z != 0)`` of every gate."""
    return jax.nn.sigmoid(log_alpha + form.shift)


def expected_l0(
    log_alpha: Float[Array, ...], group_sizes: Any = 1, form: HardConcrete = DEFAULT
) -> Float[Array, ""]:
    """``sum_g |g| P(z_g != 0)``: the expected number of weights left.

    Args:
      log_alpha: any shape.
      group_sizes: weights behind each gate (a number, or an array that broadcasts): a gate that
        removes 300 weights pays 300 times. MACs instead of sizes give a cost-aware penalty.
      form: see `HardConcrete`.
    """
    return jnp.sum(active_probability(log_alpha, form) * jnp.asarray(group_sizes, log_alpha.dtype))


GateSpec = Mapping[str, str]


def init_gates(
    params: PyTree, spec: GateSpec, *, key: jax.Array, droprate: float | Mapping[str, float] = 0.5
) -> dict[str, Array]:
    """Gates for the kernels that a spec names.

    Args:
      params: any Flax tree.
      spec: ``{kernel path: granularity}``: ``channel`` gates input units (dense layers in the
        paper), ``filter`` output maps with their bias (convolutions), ``weight`` single weights.
      key: PRNG key; ``log_alpha ~ N(log((1 - p) / p), 0.01^2)``.
      droprate: p, or one for each path (default 0.5; the paper takes 0.2 for inputs).

    Returns:
      ``{path: log_alpha}`` in the shape of the group arrays (`granularity.group_shape`).

    Raises:
      KeyError: a path that is no leaf.
      ValueError: a leaf without groups of that kind (rank below 2), or a rate outside (0, 1).
    """
    flat = tree.flatten(params)
    out = {}
    for i, (path, name) in enumerate(spec.items()):
        _check(path, name, flat)
        rate = droprate.get(path, 0.5) if isinstance(droprate, Mapping) else droprate
        if not 0 < rate < 1:
            raise ValueError(f"the drop rate of {path} must lie in (0, 1), got {rate}")
        shape = grain.group_shape(flat[path].shape, name)
        noise = 0.01 * jax.random.normal(jax.random.fold_in(key, i), shape)
        out[path] = math.log((1 - rate) / rate) + noise
    return out


def gated(params: PyTree, spec: GateSpec, **options: Any) -> dict[str, Any]:
    """``{"params": params, "gates": log_alphas}`` to train; options of `init_gates`."""
    return {"params": params, "gates": init_gates(params, spec, **options)}


def apply_gates(params: PyTree, values: Mapping[str, Array], spec: GateSpec) -> PyTree:
    """Multiplies each kernel by its gates; a ``filter`` gate also multiplies the filter's bias."""
    flat = tree.flatten(params)
    scaled = {}
    for path, name in spec.items():
        z = values[path].astype(flat[path].dtype)
        scaled[path] = flat[path] * z
        bias = _bias_of(path, name, flat)
        if bias is not None:
            scaled[bias] = flat[bias] * z.reshape(-1)
    return tree.map_with_path(lambda path, leaf: scaled.get(path, leaf), params)


def reparam(spec: GateSpec, form: HardConcrete = DEFAULT) -> Callable[[PyTree, Any], PyTree]:
    """For `cnnjax.training.Hooks(reparam=...)`: one draw a step in training, `eval_gate` after."""

    def apply(trained: PyTree, context: Any) -> PyTree:
        values = {}
        for i, path in enumerate(spec):
            log_alpha = jnp.clip(trained["gates"][path], *LOG_ALPHA_BOUNDS)
            if context.train:
                values[path] = sample(jax.random.fold_in(context.key, i), log_alpha, form)
            else:
                values[path] = eval_gate(log_alpha, form)
        return apply_gates(trained["params"], values, spec)

    return apply


def penalty(
    spec: GateSpec,
    strength: float | Mapping[str, float],
    *,
    l2: float = 0.0,
    costs: Mapping[str, float] | None = None,
    form: HardConcrete = DEFAULT,
) -> Callable[[PyTree, Any], Any]:
    """For `cnnjax.training.Hooks(penalty=...)`: ``lambda`` times the expected l0 norm.

    Args:
      spec: see `init_gates`.
      strength: lambda (the paper divides by the number of examples: 0.1 / 60000), or one per path.
      l2: rho of ``sum_g P(z_g != 0) rho/2 ||theta_g||^2``.
      costs: price of one gate of a path, in place of the number of weights that it holds (MACs).
      form: see `HardConcrete`.
    """

    def value(trained: PyTree, context: Any) -> Any:
        del context
        flat = tree.flatten(trained["params"])
        total = jnp.zeros(())
        for path, name in spec.items():
            log_alpha = jnp.clip(trained["gates"][path], *LOG_ALPHA_BOUNDS)
            lam = strength[path] if isinstance(strength, Mapping) else strength
            price = (costs or {}).get(path, group_size(path, name, flat))
            total = total + lam * expected_l0(log_alpha, price, form)
            if l2:
                axes = tuple(a for a, n in enumerate(log_alpha.shape) if n == 1)
                square = jnp.sum(jnp.square(flat[path]), axis=axes, keepdims=True)
                alive = active_probability(log_alpha, form)
                total = total + 0.5 * l2 * jnp.sum(alive * square)
        return total

    return value


def group_size(path: str, name: str, flat: Mapping[str, Any]) -> int:
    """Weights behind one gate, the bias of a filter included."""
    shape = flat[path].shape
    groups = int(np.prod(grain.group_shape(shape, name)))
    return int(np.prod(shape)) // groups + (_bias_of(path, name, flat) is not None)


def fold(trained: PyTree, spec: GateSpec, form: HardConcrete = DEFAULT) -> tuple[PyTree, PyTree]:
    """The trained network without gates: test gates multiplied into the weights.

    Gated and folded networks compute the same; zero groups then go by `select_channels` with the
    scores of `gate_scores`, or as a mask.

    Returns:
      ``(params, mask)``; the mask is False where a gate is exactly 0.
    """
    values = {
        path: eval_gate(jnp.clip(trained["gates"][path], *LOG_ALPHA_BOUNDS), form) for path in spec
    }
    params = apply_gates(trained["params"], values, spec)
    ones = jax.tree.map(lambda w: jnp.ones(w.shape, jnp.float32), trained["params"])
    mask = jax.tree.map(lambda m: m != 0, apply_gates(ones, values, spec))
    return params, mask


def project(trained: PyTree) -> PyTree:
    """Clamps ``log_alpha`` to [log 1e-2, log 1e2] as the released code; for ``post_update``."""
    gates = jax.tree.map(lambda a: jnp.clip(a, *LOG_ALPHA_BOUNDS), trained["gates"])
    return {**trained, "gates": gates}


def _check(path: str, name: str, flat: Mapping[str, Any]) -> None:
    if path not in flat:
        raise KeyError(f"no leaf {path!r} to gate.{did_you_mean(path, flat)}")
    grain.canonical(name)
    if flat[path].ndim < 2:
        raise ValueError(f"gates act on kernels; {path} has shape {tuple(flat[path].shape)}")


def _bias_of(path: str, name: str, flat: Mapping[str, Any]) -> str | None:
    if grain.canonical(name) != "filter":
        return None
    beside = path.rpartition("/")[0] + "/bias" if "/" in path else "bias"
    leaf = flat.get(beside)
    return beside if leaf is not None and leaf.shape == flat[path].shape[-1:] else None
