"""Training of separable layers from scratch: a BatchNorm behind each of the two halves (Tai)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cnnjax import ops, surgery
from cnnjax.errors import did_you_mean
from cnnjax.factorization.chain import Chain
from cnnjax.factorization.modules import chain_module
from cnnjax.factorization.network import plan
from cnnjax.factorization.rules import Rule, Spatial
from cnnjax.factorization.sites import find_sites
from cnnjax.factorization.survey import LayerPlan, Plan, spec_of

STARTS = ("he", "svd", "weights")


def constrain_low_rank(
    model: nnx.Module,
    rules: Mapping[str, Rule | None] | Rule | Plan,
    *,
    example: Any,
    start: str = "he",
    norm: bool = True,
    key: Any = None,
) -> nnx.Module:
    """A network whose convolutions are ``kh x 1``, BatchNorm, ``1 x kw``, BatchNorm, to be trained.

    Twice the depth makes gradients explode or vanish; the BatchNorm between the halves prevents it.
    A BatchNorm that the network has behind a layer serves as the second one, otherwise one is added
    (and takes the place of the layer's bias). No ReLU sits between the halves.

    Args:
      model: any NNX network; untouched.
      rules: `Spatial` rules by path glob (None keeps a layer), one rule, or a `Plan` of them.
      example: an input, abstract or not.
      start: ``"he"``: both halves drawn with the variance of He et al. for their own fan-in;
        ``"svd"``: the decomposition of a kernel drawn so; ``"weights"``: of the layer's own kernel,
        with BatchNorms that are the identity in evaluation.
      norm: False leaves the BatchNorms out (to see what they are good for).
      key: of the draws; default ``key(0)``.

    Raises:
      ValueError: as `plan`; another rule than `Spatial`; an unknown start; dense layers.

    Reference:
      Tai et al., "Convolutional neural networks with low-rank regularization", ICLR 2016,
      arXiv 1511.06067, section 3.
    """
    if start not in STARTS:
        raise ValueError(f"unknown start {start!r}.{did_you_mean(start, STARTS)}")
    decided = rules if isinstance(rules, Plan) else plan(model, rules, example)
    key = jax.random.key(0) if key is None else key
    entries = [p for p in decided.layers if p.ranks and not p.kept]
    sites = {s.path: s for s in find_sites(model, [p.path for p in entries], example)}
    out = model
    for index, entry in enumerate(entries):
        layer = surgery.module_at(model, entry.path)
        if not isinstance(entry.rule, Spatial) or not isinstance(layer, nnx.Conv):
            raise ValueError(
                f"{entry.path}: constrained training takes Spatial rules on convolutions, not "
                f"{type(entry.rule).__name__} on {type(layer).__name__}"
            )
        alone = norm and sites[entry.path].norm is None
        module = _module(layer, entry, start, norm, alone, jax.random.fold_in(key, index))
        out = surgery.replace(out, entry.path, module)
    return out


def _module(layer: nnx.Conv, entry: LayerPlan, start: str, norm: bool, last: bool, key: Any) -> Any:
    spec = spec_of(layer, entry.path)
    kernel = layer.kernel[...]
    bias = None if layer.bias is None or (last and start != "weights") else layer.bias[...]
    if start == "svd":
        kernel = _he(key, kernel.shape)
    if start == "he":
        keys = jax.random.split(key)
        stages = entry.rule.stages(kernel.shape, entry.ranks, spec)
        kernels = tuple(_he(k, shape) for k, (shape, _) in zip(keys, stages))
        chain = Chain(kernels, tuple(s for _, s in stages), bias)
    else:
        chain = entry.rule.chain(key, kernel, entry.ranks, spec, bias)
    first, second = chain_module(chain, layer).layers
    if not norm:
        return nnx.Sequential(first, second)
    parts = [first, _identity_norm(chain.kernels[0].shape[-1], layer), second]
    if last:
        parts.append(_identity_norm(kernel.shape[-1], layer))
    return nnx.Sequential(*parts)


def _he(key: Any, shape: tuple[int, ...]) -> jax.Array:
    fan_in = shape[0] * shape[1] * shape[2]
    return jnp.sqrt(2.0 / fan_in) * jax.random.normal(key, shape)


def _identity_norm(features: int, like: nnx.Conv) -> nnx.BatchNorm:
    """A BatchNorm whose initial statistics and scale make it the identity in evaluation."""
    norm = ops.BatchNorm(
        features,
        momentum=0.9,
        epsilon=1e-5,
        use_fast_variance=False,
        dtype=like.dtype,
        param_dtype=like.param_dtype,
        rngs=nnx.Rngs(0),
    )
    norm.scale = nnx.Param(jnp.full((features,), (1.0 + 1e-5) ** 0.5, like.param_dtype))
    return norm
