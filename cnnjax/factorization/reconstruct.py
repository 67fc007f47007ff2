"""Factors fitted to data inside a network, layer by layer from its front.

For each layer the factors' response is compared with what the *original* network answers there on
the same images, and the last factor is solved so that it answers alike: behind the layer's ReLU
where one follows. Asymmetric (the default): the factors see the inputs that the network compressed
so far gives them, so that later layers absorb the errors of earlier ones.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cnnjax import surgery
from cnnjax.factorization.asymmetric import Asymmetric3D
from cnnjax.factorization.chain import Chain
from cnnjax.factorization.compose import compose_chain
from cnnjax.factorization.matrix import check_finite
from cnnjax.factorization.modules import _linear, chain_module, factor_module
from cnnjax.factorization.network import plan
from cnnjax.factorization.onepass import OnePass
from cnnjax.factorization.response import (
    LowRankMap,
    nonlinear_response_low_rank,
    response_low_rank,
)
from cnnjax.factorization.rules import Basis, Rule
from cnnjax.factorization.sites import (
    Batches,
    Site,
    check_samples,
    find_sites,
    gather_responses,
    images,
    sampled,
)
from cnnjax.factorization.survey import LayerPlan, Plan, spec_of

_STATISTICS = ("mean", "var", "scale", "bias")


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """How responses are fitted.

    Attributes:
      positions: sampled positions of each image's map.
      nonlinear: minimise the error behind the ReLU where one follows (else of the response).
      asymmetric: inputs of the compressed network; False: of the original one.
      rounds: alternations at each penalty of the nonlinear solver.
    """

    positions: int = 10
    nonlinear: bool = True
    asymmetric: bool = True
    rounds: int = 25

    def __post_init__(self) -> None:
        for field in ("positions", "rounds"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; expected at least 1")


@dataclasses.dataclass(frozen=True)
class LayerFit:
    """How well one layer was fitted, on the samples that it was fitted to.

    Attributes:
      path: of the layer.
      ranks: of its factors.
      samples: number of responses.
      relu: whether errors are taken behind a ReLU.
      before: ``sum |z - y|^2 / sum |z|^2`` of the responses y that go into the fit.
      after: the same after the fit.
    """

    path: str
    ranks: tuple[int, ...]
    samples: int
    relu: bool
    before: float
    after: float


def reconstruct(
    model: nnx.Module,
    rules: Mapping[str, Rule | None] | Rule | Plan,
    batches: Batches,
    *,
    example: Any,
    options: Reconstruction | None = None,
    key: Any = None,
) -> tuple[nnx.Module, tuple[LayerFit, ...]]:
    """A factorized network whose factors are fitted to the responses of the original.

    `Basis` and `Asymmetric3D` get their channel rank from the responses (reduced-rank regression,
    Zhang et al.); for every other rule the factors of the weights come first and their last one is
    multiplied by the best map of its responses (Jaderberg et al., data reconstruction, in closed
    form). A BatchNorm behind a layer stays where it is: its affine map goes into the factors, and
    it becomes the identity with the statistics of the new responses, so that fine-tuning has it.

    Args:
      model: any NNX network; untouched.
      rules: as for `factorize`: a `Plan` (e.g. of `pca_plan`), rules by path glob, or one rule.
      batches: training inputs, arrays or mappings with ``"image"``, that may be iterated again.
        Where all have one shape, one forward pass does for all layers (the feature maps of all
        batches at one layer are held); otherwise, and in symmetric form, one for each layer.
      example: an input, abstract or not.
      options: see `Reconstruction`.
      key: of the sampled positions and of rules with random starts; default ``key(0)``.

    Returns:
      The new network, and how well each layer was fitted.

    Raises:
      ValueError: as `factorize`; a layer that is not applied exactly once; fewer samples than a
        layer has outputs (10 times as many are advisable).

    Reference:
      Zhang et al., TPAMI 2016, arXiv 1505.06798; Jaderberg et al., BMVC 2014, arXiv 1405.3866.
    """
    options = options or Reconstruction()
    key = jax.random.key(0) if key is None else key
    decided = rules if isinstance(rules, Plan) else plan(model, rules, example)
    entries = {p.path: (i, p) for i, p in enumerate(decided.layers) if p.ranks and not p.kept}
    if not entries:
        return model, ()
    sites = find_sites(model, list(entries), example)
    where = jax.random.fold_in(key, len(decided.layers))
    targets = gather_responses(model, sites, batches, where, options.positions)
    for path, samples in targets.items():
        check_finite(samples, f"sample of responses of {path}")
    starts = {}
    for site in sites:
        index, entry = entries[site.path]
        layer = surgery.module_at(model, site.path)
        starts[site.path] = (layer, *_start(layer, entry, jax.random.fold_in(key, index)))
    walk = _one_pass(model, sites, batches, starts) if options.asymmetric else None
    out, fits = model, []
    for site in sites:
        layer, module, rank = starts[site.path]
        if walk is not None:
            y = sampled(walk.until(site), where, options.positions)
        elif not options.asymmetric and module is layer:
            y = targets[site.path]
        else:
            base = out if options.asymmetric else model
            if module is not layer:
                base = surgery.replace(base, site.path, module)
            y = gather_responses(base, (site,), batches, where, options.positions)[site.path]
        entry = entries[site.path][1]
        fitted, fit = _fit(y, targets[site.path], entry, rank, _groups(layer), site, options)
        out = _install(out, layer, module, site, fitted, y, split=rank is not None)
        if walk is not None:
            walk.put(site, functools.partial(_mapped, fitted))
        fits.append(fit)
    return out, tuple(fits)


def _one_pass(model: Any, sites: Any, batches: Batches, starts: Mapping[str, Any]) -> Any:
    """None where batches differ in shape: then the network is run anew for each layer."""
    held = list(images(batches))
    if len({x.shape for x in held}) != 1:
        return None
    kernels = {
        path: compose_module(module, layer)
        for path, (layer, module, _) in starts.items()
        if module is not layer
    }
    return OnePass(model, sites, held, kernels)


def _mapped(fitted: list[LowRankMap], y: Any) -> Any:
    parts = jnp.split(y, len(fitted), axis=-1)
    return jnp.concatenate([m(part) for m, part in zip(fitted, parts)], axis=-1)


def compose_module(module: Any, layer: Any) -> Any:
    """The kernel, of the layer's shape, that its replacement amounts to."""
    if isinstance(layer, nnx.Linear):
        first, second = (m.kernel[...] for m in module.layers)
        return jnp.matmul(first, second, precision="highest")
    specs = tuple(spec_of(m, "layer") for m in module.layers)
    chain = Chain(tuple(m.kernel[...] for m in module.layers), specs)
    return compose_chain(chain, layer.kernel_size, layer.feature_group_count)


def _groups(layer: Any) -> int:
    return layer.feature_group_count if isinstance(layer, nnx.Conv) else 1


def _start(layer: Any, entry: LayerPlan, key: Any) -> tuple[Any, int | None]:
    """What stands in the layer's place while responses are taken, and the rank of their map."""
    if isinstance(entry.rule, Basis):
        return layer, entry.ranks[0]
    if isinstance(entry.rule, Asymmetric3D):
        spec, bias = spec_of(layer, entry.path), layer.bias
        bias = None if bias is None else bias[...]
        chain = entry.rule.spatial_part(layer.kernel[...], entry.ranks[0], spec, bias)
        return chain_module(chain, layer), entry.ranks[1]
    return factor_module(layer, entry, key), None


def _fit(
    y: Any,
    z: Any,
    entry: LayerPlan,
    rank: int | None,
    groups: int,
    site: Site,
    options: Reconstruction,
) -> tuple[list[LowRankMap], LayerFit]:
    """One map per group of outputs."""
    outputs = y.shape[1] // groups
    check_samples(site.path, y.shape[0], outputs)
    columns = outputs if rank is None else rank
    fitted = []
    for g in range(groups):
        part = slice(g * outputs, (g + 1) * outputs)
        if site.relu and options.nonlinear:
            solve = nonlinear_response_low_rank(
                y[:, part], columns, target=z[:, part], rounds=options.rounds
            )
        else:
            solve = response_low_rank(y[:, part], columns, z=z[:, part])
        fitted.append(solve)
    before, after = _errors(y, z, fitted, site.relu)
    return fitted, LayerFit(site.path, entry.ranks, y.shape[0], site.relu, before, after)


def _errors(y: Any, z: Any, fitted: list[LowRankMap], relu: bool) -> tuple[float, float]:
    parts = np.split(np.asarray(y), len(fitted), axis=1)
    new = np.concatenate([np.asarray(m(p)) for m, p in zip(fitted, parts)], axis=1)

    def behind(a: Any) -> np.ndarray:
        a = np.asarray(a, np.float64)
        return np.maximum(a, 0) if relu else a

    target = behind(z)
    scale = max(float(np.sum(target**2)), np.finfo(float).tiny)
    before, after = (float(np.sum((target - behind(a)) ** 2)) / scale for a in (y, new))
    return before, after


def _install(
    net: nnx.Module,
    layer: Any,
    module: Any,
    site: Site,
    fitted: list[LowRankMap],
    y: Any,
    *,
    split: bool,
) -> nnx.Module:
    """Puts the maps behind the last factor (``split``: as a factor of their own)."""
    *earlier, last = module.layers if isinstance(module, nnx.Sequential) else [module]
    y = np.asarray(y, np.float64)
    own = np.zeros(y.shape[1]) if last.bias is None else np.asarray(last.bias[...], np.float64)
    gain, shift = np.ones(y.shape[1]), own
    norm: Any = surgery.module_at(net, site.norm) if site.norm else None
    if norm is not None:
        n = {k: np.asarray(getattr(norm, k)[...], np.float64) for k in _STATISTICS}
        gain = n["scale"] / np.sqrt(n["var"] + norm.epsilon)
        shift = gain * (own - n["mean"]) + n["bias"]
    p, q, b = (np.stack([np.asarray(a, np.float64) for a in part]) for part in zip(*fitted))
    groups, outputs, rank = p.shape  # q alike, b (g, o)

    def mapped(values: np.ndarray) -> np.ndarray:
        blocks = values.reshape(*values.shape[:-1], groups, outputs)
        code = np.einsum("gpr,...gp->...gr", q, blocks)
        return np.einsum("gor,...gr->...go", p, code).reshape(values.shape)

    kernel = np.asarray(last.kernel[...], np.float64) * gain
    bias = mapped(shift) + b.reshape(-1)
    own_bias = bias if norm is None else None
    if split:
        blocks = kernel.reshape(*kernel.shape[:-1], groups, outputs)
        first = np.einsum("...gp,gpr->...gr", blocks, q).reshape(*kernel.shape[:-1], -1)
        mix = np.moveaxis(p, 2, 0).reshape(rank, -1)
        new = [*earlier, *_two(last, first, mix, own_bias)]
    else:
        new = [*earlier, _stage(last, mapped(kernel), None, own_bias)]
    out = surgery.replace(net, site.path, nnx.Sequential(*new))
    if norm is None:
        return out
    emitted = mapped(y - shift)
    mean, var = emitted.mean(0), emitted.var(0)
    scale = np.sqrt(var + norm.epsilon)
    values = {"mean": mean, "var": var, "scale": scale, "bias": mean + bias}
    return surgery.fill(
        out,
        {f"{site.norm}/{k}": jnp.asarray(values[k], getattr(norm, k)[...].dtype) for k in values},
    )


def _two(layer: Any, first: Any, mix: Any, bias: Any) -> list[Any]:
    """The layer with other outputs, and the 1x1 (or dense) layer behind it."""
    if isinstance(layer, nnx.Linear):
        return [_stage(layer, first, None, None), _stage(layer, mix, None, bias)]
    pointwise = spec_of(layer, "layer").pointwise()
    return [_stage(layer, first, None, None), _stage(layer, mix[None, None], pointwise, bias)]


def _stage(layer: Any, kernel: Any, spec: Any, bias: Any) -> Any:
    """A layer of the same kind with other numbers, and another geometry if ``spec`` is given."""
    if isinstance(layer, nnx.Linear):
        return _linear(layer, kernel, bias)
    spec = spec or spec_of(layer, "layer")
    return chain_module(Chain((kernel,), (spec,), bias), layer).layers[0]
