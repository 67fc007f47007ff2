"""Depth: stages of blocks, run one after the other or scanned, and random depth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cnnjax.models import blocks


class RandomDepth(nnx.Module):
    """Survival gates of a network's residual branches.

    Huang, Sun, Liu, Sedra, Weinberger, "Deep networks with stochastic depth", ECCV 2016,
    1603.09382: branch l of L survives with probability p_l, drawn once per batch; at evaluation it
    is scaled by p_l. Nothing is rescaled at training, as in the original.

    Args:
      count: L.
      final: survival probability of the last branch.
      decay: ``"linear"``, p_l = 1 - (l / L) (1 - final), or ``"uniform"``, p_l = final.
      rngs: stream ``dropout``.
    """

    def __init__(self, count: int, final: float, *, rngs: nnx.Rngs, decay: str = "linear"):
        if decay == "linear":
            self.keep = tuple(1.0 - (i / count) * (1.0 - final) for i in range(1, count + 1))
        else:
            self.keep = (final,) * count
        self.deterministic = False
        self.rngs = rngs["dropout"].fork()

    def set_view(self, deterministic: bool | None = None, **kwargs: Any) -> dict[str, Any]:
        """Used by ``nnx.view``."""
        if deterministic is not None:
            self.deterministic = deterministic
        return kwargs

    def __call__(self) -> Any:
        """The gates (L,): 0 or 1 at training, survival probabilities at evaluation."""
        keep = jnp.asarray(self.keep, jnp.float32)
        if self.deterministic:
            return keep
        return (jax.random.uniform(self.rngs(), keep.shape) < keep).astype(jnp.float32)


class Repeated(nnx.Module):
    """``count`` blocks of one structure, parameters stacked on axis 0, run by ``lax.scan``.

    One block is compiled however deep the network is.

    Args:
      make: ``make(rngs)`` builds one block that maps a shape to itself.
      count: how many.
      rngs: every block draws its own parameters and streams.
    """

    def __init__(self, make: Callable[[nnx.Rngs], Any], count: int, *, rngs: nnx.Rngs):
        self.count = count

        @nnx.split_rngs(splits=count)
        @nnx.vmap(in_axes=0, out_axes=0)
        def build(rngs: nnx.Rngs) -> Any:
            return make(rngs)

        self.repeated = build(rngs)

    def __call__(
        self, x: Any, gates: Any = None, *, remat: bool = False, every: bool = False
    ) -> Any:
        """x through every block; ``gates`` (count,) goes to the blocks one by one.

        With ``every`` also all blocks' outputs, stacked (count, N, H, W, C).
        """
        graphdef, params, rest = nnx.split(self.repeated, nnx.Param, ...)

        def body(x: Any, xs: Any) -> Any:
            params, rest, gate = xs
            block = nnx.merge(graphdef, params, rest, copy=True)
            y = block(x) if gate is None else block(x, gate)
            return y, (nnx.state(block, nnx.Not(nnx.Param)), y if every else None)

        if remat:
            body = jax.checkpoint(body, prevent_cse=False)
        x, (new, maps) = jax.lax.scan(body, x, (params, rest, gates))
        nnx.update(self.repeated, new)
        return (x, maps) if every else x


def make_stage(
    make: Callable[[int, nnx.Rngs], Any], count: int, *, rngs: nnx.Rngs, scan: bool = False
) -> Any:
    """A stage of ``count`` blocks.

    Args:
      make: ``make(index, rngs)``; all but the first must be alike.
      count: how many.
      rngs: random streams.
      scan: stack all but the first, see `Repeated`.
    """
    if not scan or count < 3:
        return nnx.List([make(i, rngs) for i in range(count)])
    rest = Repeated(lambda r: make(1, r), count - 1, rngs=rngs)
    return nnx.List([make(0, rngs), rest])


def run_stage(
    stage: Any,
    x: Any,
    taps: blocks.Taps,
    name: str,
    *,
    gates: Any = None,
    remat: bool = False,
) -> Any:
    """x through a stage; features ``name/index`` of every block, ``name``.

    A scanned block's map is kept only if it is asked for (then those of all the scanned blocks are
    computed into one array).

    Args:
      stage: of `make_stage`.
      x: (N, H, W, C).
      taps: collects features.
      name: of the stage.
      gates: one per block, from `RandomDepth`, or None.
      remat: recompute activations in the backward pass.
    """
    done = 0
    for block in stage:
        if isinstance(block, Repeated):
            part = None if gates is None else gates[done : done + block.count]
            names = [f"{name}/{done + i}" for i in range(block.count)]
            wanted = [taps.wants(n) for n in names]
            done += block.count
            if any(wanted[:-1]):
                x, maps = block(x, part, remat=remat, every=True)
                for i, (n, keep) in enumerate(zip(names, wanted, strict=True)):
                    if keep:
                        taps(n, maps[i])
                continue
            x = block(x, part, remat=remat)
        else:
            x = blocks.run(block, x, *(() if gates is None else (gates[done],)), remat=remat)
            done += 1
        taps(f"{name}/{done - 1}", x)
    return taps(name, x)
