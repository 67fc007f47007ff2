"""Net2DeeperNet: an identity layer after an activation, the same function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cnnjax import surgery
from cnnjax.distillation.sameness import difference, evaluate, run
from cnnjax.graph import capture

SIDES = ("output", "input")
_TOLERANCE = 1e-5


def deepen(
    model: nnx.Module,
    path: str,
    *example: Any,
    side: str = "output",
    activation: Callable[[Any], Any] | None = jax.nn.relu,
    kernel_size: int = 3,
    norm: bool = False,
    epsilon: float = 1e-5,
    rngs: nnx.Rngs,
) -> Any:
    """A deeper model that computes the same function: an identity layer behind an activation.

    The new layer, ``activation(norm(conv(.)))``, goes behind the module at ``path`` or in front of
    it, by an ``nnx.Sequential`` that stands in the module's place (so the variables of the old
    module move to ``path/layers/...``). What flows there must be the activation's own output: in
    front of a layer that reads ``relu(...)``, behind a block that ends in one, or behind an
    activation in an ``nnx.Sequential``.

    Args:
      model: any NNX module; untouched.
      path: of a module.
      *example: arrays that the model is called with: real data, since ``norm`` takes its statistics
        from them; used in evaluation mode.
      side: ``"output"``: behind the module; ``"input"``: in front of it.
      activation: idempotent, element-wise, public (``jax.nn.relu``); None for a linear layer.
      kernel_size: odd; feature maps (n, h, w, c) get a convolution, vectors (n, c) a dense layer.
      norm: put a BatchNorm between, whose scale and shift undo the normalization by the example's
        statistics: exact in evaluation mode, up to the batch's noise in training mode.
      epsilon: of the BatchNorm.
      rngs: any; the new parameters are determined, but Flax's constructors ask for it.

    Returns:
      The deeper module, with an edit ``"distillation.deepen"`` on its record.

    Raises:
      KeyError: no such module.
      ValueError: the activation isn't idempotent, an even kernel size, a module that gives no
        (n, ..., c) array there, or a place whose values the activation would change.

    Reference:
      Chen, Goodfellow, Shlens, ICLR 2016, arXiv 1511.05641, section 2.3.
    """
    if side not in SIDES:
        raise ValueError(f"side is {side!r}; expected one of {SIDES}")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size is {kernel_size}; an identity kernel has an odd size")
    if not example:
        raise ValueError("give an example input (real data where norm=True)")
    _check_idempotent(activation)
    surgery.module_at(model, path)
    viewed = nnx.view(model, deterministic=True, use_running_average=True, raise_if_not_found=False)
    before, values = _values(viewed, path, side, example)
    value = values[0]
    if not hasattr(value, "ndim") or value.ndim not in (2, 4):
        raise ValueError(
            f"{path!r} {side}: expected a feature map (n, h, w, c) or vectors (n, c), got "
            f"{getattr(value, 'shape', type(value).__name__)}"
        )
    value = np.asarray(value, np.float64)
    _check_flow(activation, value, path, side)
    channels = value.shape[-1]
    layers: list[Any] = [_identity(channels, kernel_size, value.ndim, values[0].dtype, rngs)]
    if norm:
        layers.append(_norm(channels, value, epsilon, model, rngs))
    if activation is not None:
        layers.append(activation)
    out = _insert(model, path, side, layers)
    after, _ = run(out, surgery.leaves(out), example)
    worst = difference(after, before)
    if not worst <= _TOLERANCE:
        raise ValueError(
            f"deepening at {path!r} ({side}) changes the function (outputs differ by {worst:.1e} "
            "of the largest): the module is not only called once with one array"
        )
    return out


def _values(
    model: nnx.Module, path: str, side: str, example: tuple[Any, ...]
) -> tuple[list[np.ndarray], list[Any]]:
    graphdef, state = nnx.split(model)

    def call(state: Any, *args: Any) -> Any:
        return capture(nnx.merge(graphdef, state, copy=True), {path: side})(*args)

    (out, found), _ = evaluate(call, state, *example)
    if len(found) > 1:
        raise ValueError(f"{path!r} is called {len(found)} times; a layer there would be shared")
    return [np.asarray(x, np.float64) for x in jax.tree.leaves(out)], list(found.values())


def _check_idempotent(activation: Callable[[Any], Any] | None) -> None:
    if activation is None:
        return
    grid = jnp.linspace(-8.0, 8.0, 129)
    once = activation(grid)
    if once.shape != grid.shape or not np.allclose(activation(once), once, atol=1e-6):
        name = getattr(activation, "__name__", repr(activation))
        raise ValueError(
            f"{name} is not idempotent ({name}({name}(v)) differs from {name}(v)), so no identity "
            "layer with it behind exists; relu, relu6 and None (linear) are fine"
        )


def _check_flow(
    activation: Callable[[Any], Any] | None, value: np.ndarray, path: str, side: str
) -> None:
    if activation is None:
        return
    kept = np.asarray(activation(jnp.asarray(value, jnp.float32)))
    if not np.allclose(kept, value, rtol=1e-5, atol=1e-6):
        name = getattr(activation, "__name__", repr(activation))
        raise ValueError(
            f"the {side} of {path!r} isn't an output of {name} ({name} changes it): an identity "
            "layer there would change the function. Choose a place behind the activation, e.g. "
            "side='input' of the layer that reads it"
        )


def _identity(channels: int, size: int, ndim: int, dtype: Any, rngs: nnx.Rngs) -> nnx.Module:
    if ndim == 2:
        dense = nnx.Linear(channels, channels, param_dtype=dtype, rngs=rngs)
        dense.kernel[...] = jnp.eye(channels, dtype=dtype)
        return dense
    conv = nnx.Conv(channels, channels, (size, size), param_dtype=dtype, rngs=rngs)
    kernel = np.zeros((size, size, channels, channels))
    kernel[size // 2, size // 2] = np.eye(channels)
    conv.kernel[...] = jnp.asarray(kernel, dtype)
    return conv


def _norm(
    channels: int, value: np.ndarray, epsilon: float, model: nnx.Module, rngs: nnx.Rngs
) -> nnx.Module:
    others = [m for m in surgery.modules(model).values() if isinstance(m, nnx.BatchNorm)]
    mode = others[0].use_running_average if others else False
    momentum = others[0].momentum if others else 0.9
    norm: Any = nnx.BatchNorm(
        channels, epsilon=epsilon, momentum=momentum, use_running_average=mode, rngs=rngs
    )
    axes = tuple(range(value.ndim - 1))
    mean, var = value.mean(axes), value.var(axes)
    dtype = norm.scale[...].dtype
    norm.mean[...], norm.var[...] = jnp.asarray(mean, dtype), jnp.asarray(var, dtype)
    norm.bias[...] = jnp.asarray(mean, dtype)
    norm.scale[...] = jnp.asarray(np.sqrt(var + epsilon), dtype)
    return norm


def _insert(model: nnx.Module, path: str, side: str, layers: list[Any]) -> nnx.Module:
    module = surgery.module_at(model, path)
    order = [module, *layers] if side == "output" else [*layers, module]
    described: list[Mapping[str, Any]] = [surgery.describe(layer) for layer in layers]
    record = {"kind": "distillation.deepen", "path": path, "side": side, "layers": described}
    return surgery.replace(model, path, nnx.Sequential(*order), record=record)


@surgery.edit("distillation.deepen")
def _replay(model: nnx.Module, *, path: str, side: str, layers: list[dict[str, Any]]) -> nnx.Module:
    return _insert(model, path, side, [surgery.build(layer) for layer in layers])
