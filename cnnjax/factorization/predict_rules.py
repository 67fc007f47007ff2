"""Denil's parameter prediction as a rule: some rows of a kernel are stored, the others predicted.

A dense layer becomes a `PredictedLinear`; a k x k convolution predicts its taps from some of them:
fixed depthwise filters, then a ``1x1`` that holds the stored taps.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from cnnjax import surgery
from cnnjax.factorization.chain import Chain, ConvSpec
from cnnjax.factorization.denil import prediction_dictionary, squared_exponential
from cnnjax.factorization.layers import PredictedLinear
from cnnjax.factorization.rules import EVBMF, Energy, Rank, Ranks, Rule, Stages
from cnnjax.factorization.sites import Batches, captured_sums
from cnnjax.factorization.survey import Plan
from cnnjax.typing import AnyArray


@dataclasses.dataclass(frozen=True)
class Predicted(Rule):
    """Stores ``rank`` rows (inputs of a dense layer, taps of a convolution), predicts the others.

    The stored numbers are the least-squares fit to the kernel; training changes only them. A
    layer whose kernel the stored rows don't predict (relative error above ``limit``) is kept
    unless ``always``. What is saved is parameters; MACs follow only where rows are few.

    Attributes:
      kernel: similarity of rows: ``"grid"`` (squared exponential of positions), or
        ``"covariance"`` of the inputs, measured by `with_input_covariances` (dense and 1x1 layers).
      scale: of the squared exponential, in pixels or taps.
      grid: (h, w) of a dense layer's inputs (h * w * c, channels last; no similarity between
        channels); None: one square image.
      groups: of columns with rows of their own (dense and 1x1 layers).
      damping: ridge of the prediction, relative.
      limit: see above.
      covariance: (n, n), put in by `with_input_covariances`.
    """

    rank: Rank = 0.5
    kernel: str = "grid"
    scale: float = 1.0
    grid: tuple[int, int] | None = None
    groups: int = 1
    damping: float = 1e-3
    limit: float = 0.9
    covariance: Any = dataclasses.field(default=None, compare=False, repr=False)

    compiled: ClassVar[bool] = False
    spectral: ClassVar[bool] = False
    dense: ClassVar[bool] = True
    saves: ClassVar[str] = "params"
    fixed_stages: ClassVar[tuple[int, ...]] = (0,)

    def __post_init__(self) -> None:
        if self.kernel not in ("grid", "covariance"):
            raise ValueError(f"kernel is {self.kernel!r}; expected 'grid' or 'covariance'")
        if not self.scale > 0 or not self.damping > 0:
            raise ValueError(
                f"scale is {self.scale} and damping {self.damping}; expected positive numbers"
            )
        if self.rank == "evbmf" or isinstance(self.rank, EVBMF | Energy):
            raise ValueError(
                f"Predicted rank is {self.rank!r}: rows have no spectrum; give a number, a share "
                "or MacsRatio"
            )

    def full(self, shape: tuple[int, ...]) -> Ranks:
        """(taps,), or (inputs,) of dense and 1x1 layers."""
        taps = shape[0] * shape[1]
        return (taps if taps > 1 else shape[2],)

    def stages(self, shape: tuple[int, ...], ranks: Ranks, spec: ConvSpec) -> Stages:
        """See `Rule.stages`."""
        kh, kw, i, o = shape
        (a,) = ranks
        if kh * kw > 1:
            n = i * spec.groups
            return [((kh, kw, 1, n * a), spec.with_groups(n)), ((1, 1, i * a, o), spec.pointwise())]
        if spec.groups > 1:
            raise ValueError(f"Predicted takes ungrouped 1x1 layers, this one has {spec.groups}")
        if o % self.groups:
            raise ValueError(f"{o} outputs do not divide into {self.groups} column groups")
        first = dataclasses.replace(spec, groups=1)
        return [
            ((1, 1, i, self.groups * a), first),
            ((1, 1, a, o), spec.pointwise().with_groups(self.groups)),
        ]

    def chain(
        self, key: Array, kernel: Array, ranks: Ranks, spec: ConvSpec, bias: Array | None
    ) -> Chain:
        """Fixed prediction, then the stored numbers."""
        kh, kw, i, o = kernel.shape
        specs = tuple(s for _, s in self.stages(kernel.shape, ranks, spec))
        if kh * kw == 1:
            dictionaries, values, _ = self.fit(key, np.asarray(kernel[0, 0]), ranks[0])
            first = dictionaries.transpose(1, 0, 2).reshape(1, 1, i, -1)
            return Chain((first, jnp.moveaxis(values, 0, 1).reshape(1, 1, -1, o)), specs, bias)
        flat = np.asarray(kernel, np.float64).reshape(kh * kw, i * o)
        u, v, _ = self.fit(key, flat, ranks[0], (kh, kw), 1)
        n = i * spec.groups
        kernels = (
            jnp.tile(u[0].reshape(kh, kw, 1, -1), (1, 1, 1, n)),
            v[0].reshape(-1, i, o).transpose(1, 0, 2).reshape(1, 1, -1, o),
        )
        return Chain(kernels, specs, bias)

    def module(self, layer: Any, ranks: Ranks, key: Array) -> Any:
        """See `Rule.module`: a dense layer's."""
        if not isinstance(layer, nnx.Linear):
            return None
        u, v, _ = self.fit(key, np.asarray(layer.kernel[...]), ranks[0])
        bias = layer.bias is not None
        made = PredictedLinear.of(u, v.shape[0] * v.shape[2], use_bias=bias, rngs=nnx.Rngs(0))
        made.value[...] = jnp.asarray(v, jnp.float32)
        if made.bias is not None and layer.bias is not None:
            made.bias[...] = layer.bias[...]
        return made

    def objection(self, kernel: np.ndarray, ranks: Ranks) -> str | None:
        """See `Rule.objection`: the smoothness gate."""
        kh, kw, i, o = kernel.shape
        if self.kernel == "covariance" and self.covariance is None:
            return None  # not measured yet
        if kh * kw > 1:
            flat = np.asarray(kernel, np.float64).reshape(kh * kw, i * o)
            error = self.fit(jax.random.key(0), flat, ranks[0], (kh, kw), 1)[2]
        else:
            error = self.fit(jax.random.key(0), np.asarray(kernel[0, 0]), ranks[0])[2]
        if error <= self.limit:
            return None
        return f"not smooth: {ranks[0]} rows predict it with a relative error of {error:.2f}"

    def fit(
        self,
        key: Array,
        weight: Float[AnyArray, "n o"],
        stored: int,
        grid: tuple[int, int] | None = None,
        groups: int | None = None,
    ) -> tuple[Float[Array, "g n a"], Float[Array, "g a m"], float]:
        """Dictionaries, stored numbers, and the relative error that `objection` judges.

        Raises:
          ValueError: where the rows have no similarity: a grid of another size, a covariance that
            was not measured.
        """
        n, o = weight.shape
        groups = self.groups if groups is None else groups
        w = np.asarray(weight, np.float64).reshape(n, groups, o // groups).transpose(1, 0, 2)
        similarity = self._similarity(n, grid)
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).astype(np.uint32))
        # where the inputs are known errors count in the answers, and the fit is what is judged;
        # on a grid the gate asks whether the stored rows alone say what the others are
        known = self.kernel == "covariance" and grid is None
        metric = similarity if known else np.eye(n)
        dictionaries, values, lost, whole = [], [], 0.0, 0.0
        for j in range(groups):
            rows = _pick(similarity, stored, None if groups == 1 else rng)
            u = np.asarray(prediction_dictionary(similarity, rows, self.damping), np.float64)
            dictionaries.append(u)
            values.append(np.linalg.lstsq(u.T @ metric @ u, u.T @ metric @ w[j], rcond=1e-7)[0])
            rest = w[j] - u @ (values[-1] if known else w[j][rows])
            lost += float(np.sum(rest * (metric @ rest)))
            whole += float(np.sum(w[j] * (metric @ w[j])))
        u, v = (jnp.asarray(np.stack(x), jnp.float32) for x in (dictionaries, values))
        return u, v, float(np.sqrt(max(lost, 0.0) / max(whole, 1e-30)))

    def _similarity(self, n: int, grid: tuple[int, int] | None) -> np.ndarray:
        if self.kernel == "covariance" and grid is None:
            if self.covariance is None:
                raise ValueError(
                    "a Predicted rule with kernel='covariance' needs its inputs measured: "
                    "with_input_covariances(model, plan, batches, example=...)"
                )
            c = np.asarray(self.covariance, np.float64)
            return c / max(float(np.mean(np.diag(c))), 1e-30)
        side = round(n**0.5)
        h, w = grid or self.grid or (side, side)
        if n % (h * w):
            raise ValueError(f"{n} rows are no {h} x {w} grid; give grid=(h, w)")
        places = np.stack(list(np.mgrid[:h, :w]), -1).reshape(-1, 2).astype(np.float64)
        alike = np.asarray(squared_exponential(places, places, self.scale), np.float64)
        return np.kron(alike, np.eye(n // (h * w)))


def _pick(similarity: np.ndarray, count: int, rng: np.random.Generator | None) -> np.ndarray:
    """Rows one by one, each the one that those before predict worst; the first may be drawn."""
    left = np.diag(similarity).copy()
    taken = np.zeros(len(left), bool)
    factor = np.zeros((len(left), count))
    for k in range(count):
        row = int(np.argmax(np.where(taken, -1, left)))
        if k == 0 and rng is not None:
            row = int(rng.integers(len(left)))
        column = similarity[:, row] - factor[:, :k] @ factor[row, :k]
        factor[:, k] = column / np.sqrt(max(float(left[row]), 1e-12))
        left = np.maximum(left - factor[:, k] ** 2, 0.0)
        taken[row] = True
    return np.flatnonzero(taken)


def with_input_covariances(model: nnx.Module, decided: Plan, batches: Batches) -> Plan:
    """The plan with the second moments of the inputs that its ``covariance`` rules ask for.

    Args:
      model: the network, run in evaluation mode.
      decided: from `plan`; returned as it is where no rule asks.
      batches: inputs, arrays or mappings with ``"image"``.

    Returns:
      A plan whose rules hold their covariances; layers that these don't predict are kept.

    Raises:
      ValueError: no batches.
    """
    asking = [
        p
        for p in decided.layers
        if isinstance(p.rule, Predicted) and p.rule.kernel == "covariance" and p.ranks
    ]
    if not asking:
        return decided

    def sums(found: dict[str, Any]) -> dict[str, Any]:
        rows = {path: v.reshape(-1, v.shape[-1]) for path, v in found.items()}
        return {path: jnp.matmul(v.T, v, precision="highest") for path, v in rows.items()}

    total = captured_sums(model, {p.path: "input" for p in asking}, sums, batches)
    layers = []
    for entry in decided.layers:
        if entry in asking:
            rule = dataclasses.replace(entry.rule, covariance=np.asarray(total[entry.path]))
            kernel: Any = surgery.module_at(model, entry.path)
            kernel = np.asarray(kernel.kernel[...])
            kernel = kernel[None, None] if kernel.ndim == 2 else kernel
            why = None if rule.always else rule.objection(kernel, entry.ranks)
            entry = dataclasses.replace(entry, rule=rule)
            if why:
                entry = entry.kept_for(why)
        layers.append(entry)
    return Plan(tuple(layers))
