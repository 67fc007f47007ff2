"""Shared by `configs/pruning_digits.py`: 8x8 digits, trained networks, result table.

The networks are those of the calibration that the expected figures come from: an MLP 64-100-50-10
(He initialization, Adam 1e-3, batch 64, 60 epochs) and a CNN conv16-conv32-pool-fc64-fc10 (30
epochs), on 1,347 of scikit-learn's 1,797 digits; 450 test images, one of which is 0.22 point.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from cnnjax import models, report, training
from cnnjax import tree as treelib

HEADER = ("entry", "expected", "measured", "met")
NOISE = 0.7  # point; smaller differences are noise on 450 images
BATCH, PER_EPOCH = 64, 21
NETS = {"mlp": ("plain_mlp", 60), "cnn": ("plain_cnn", 30)}


@dataclasses.dataclass
class Row:
    """One expected figure beside what was measured.

    Attributes:
      name: of the row.
      expected: (low, high) of the calibration; None for a claim or a figure without one.
      values: one per seed; of a claim 1.0 where it holds.
      kind: ``reach``: the mean is not below ``low`` by more than the noise; ``about``, and
        ``figure`` where something is expected: within the range and noise, a single number without
        a unit (a width) within a tenth; ``claim``: holds on every seed; ``mean``: a claim about the
        mean of the seeds (one value); ``figure`` without an expectation: only reported.
      unit: behind the measured figure.
    """

    name: str
    expected: tuple[float, float] | None
    values: list[float]
    kind: str = "reach"
    unit: str = "%"

    def met(self) -> bool | None:
        if self.kind == "figure" and self.expected is None:
            return None
        if self.kind in ("claim", "mean"):
            return all(self.values)
        assert self.expected is not None
        low, high = self.expected
        slack = NOISE if self.unit == "%" else 0.1 * low if low == high and not self.unit else 0.0
        mean = float(np.mean(self.values))
        return mean >= low - slack and (self.kind == "reach" or mean <= high + slack)

    def cells(self) -> list[str]:
        met = {None: "", True: "yes", False: "no"}[self.met()]
        if self.kind in ("claim", "mean"):
            return [self.name, "holds", f"{sum(self.values):.0f} of {len(self.values)}", met]
        text = report.spread(
            {"mean": float(np.mean(self.values)), "min": min(self.values), "max": max(self.values)}
        )
        expected = ""
        if self.expected is not None:
            low, high = self.expected
            expected = f"{low:g}" if low == high else f"{low:g}-{high:g}"
        return [self.name, expected, f"{text} {self.unit}".rstrip(), met]


class Lab:
    """Data and trained networks of all seeds; dense networks are trained once and kept on disk."""

    def __init__(self, seeds: Sequence[int], scale: float = 1.0, cache: str | None = None):
        from sklearn.datasets import load_digits

        raw = load_digits()
        order = np.random.RandomState(0).permutation(len(raw.target))
        x = (raw.images[order] / 16).astype(np.float32)[..., None]
        y = raw.target[order].astype(np.int32)
        self.x, self.y, self.xt, self.yt = x[:1347], y[:1347], x[1347:], y[1347:]
        self.seeds, self.scale = list(seeds), scale
        place = cache or os.path.join(tempfile.gettempdir(), "cnnjax-digits-lab-he")
        self.cache = pathlib.Path(place) / f"scale-{scale:g}"
        self._nets: dict[str, Any] = {}
        self._dense: dict[str, list[Any]] = {}

    def model(self, kind: str, seed: int = 0) -> Any:
        return models.create(NETS[kind][0], rngs=nnx.Rngs(seed))

    def network(self, kind: str) -> tuple[Any, Any, Callable[..., Any]]:
        """``(network, stats, logits)``; ``logits(params, x)`` is jitted."""
        if kind not in self._nets:
            network, state = training.create_state(self.model(kind), optax.sgd(0.1), seed=0)
            stats = jax.tree.map(np.asarray, state.stats)

            @jax.jit
            def logits(params: Any, x: Any) -> Any:
                return network.model(params, stats)(x)

            self._nets[kind] = (network, stats, logits)
        return self._nets[kind]

    def build(self, kind: str, params: Any) -> Any:
        """The module with these parameters, in evaluation mode."""
        network, stats, _ = self.network(kind)
        model = network.model(params, stats)
        model.eval()
        return model

    def accuracy(self, kind: str, params: Any) -> float:
        """Percent of the 450 test images."""
        found = np.asarray(self.network(kind)[2](params, self.xt)).argmax(-1)
        return 100.0 * float(np.mean(found == self.yt))

    def accuracy_of(self, model: Any) -> float:
        """Percent of the test images, of any module (shrunk ones)."""
        found = np.asarray(nnx.jit(lambda m, x: m(x))(model, self.xt)).argmax(-1)
        return 100.0 * float(np.mean(found == self.yt))

    def batches(self, seed: int, stacked: int) -> Iterator[Any]:
        """Endless shuffled batches of 64; ``stacked`` is only what `training.fit` asks for."""
        del stacked
        rng = np.random.default_rng(seed)
        while True:
            order = rng.permutation(len(self.y))
            for at in range(0, PER_EPOCH * BATCH, BATCH):
                pick = order[at : at + BATCH]
                yield {"image": self.x[pick], "label": self.y[pick]}

    def steps(self, epochs: float) -> int:
        return PER_EPOCH * max(1, round(epochs * self.scale))

    def fit(
        self,
        model: Any,
        optimizer: Any,
        starts: Sequence[Any],
        epochs: float,
        *,
        hooks: Any = None,
        extra: Callable[[Any], Any] | None = None,
        scan: bool = True,
    ) -> list[Any]:
        """Final states of `cnnjax.training.fit` from each start; one compiled step for all.

        Args:
          model: a module (architecture and initial statistics).
          optimizer: complete.
          starts: trained pytrees, one per seed.
          epochs: of 21 batches.
          hooks: of the step.
          extra: trained pytree -> the state's free slot.
          scan: an epoch in one call; not for convolutions on a CPU.
        """
        per_call = PER_EPOCH if scan else 1
        config = training.StepConfig(steps_per_call=per_call)
        run = training.FitConfig(self.steps(epochs), log_every=0, progress=False)
        step, out = None, []
        for seed, start in zip(self.seeds, starts):
            start = jax.tree.map(jnp.array, start)
            more = {} if extra is None else {"extra": extra(start)}
            network, state = training.create_state(
                model, optimizer, seed=seed, params=start, **more
            )
            if step is None:
                step = training.make_train_step(
                    network, optimizer, config=config, hooks=hooks or training.Hooks()
                )
            state = training.fit(step, state, self.batches(seed, per_call), run).state
            out.append(jax.tree.map(jax.device_get, state))
        return out

    def initial(self, kind: str) -> list[Any]:
        """Untrained parameters of every seed: He's normal initialization, as the calibration."""
        shapes = nnx.to_pure_dict(nnx.state(self.model(kind), nnx.Param))
        out = []
        for seed in self.seeds:
            rng = np.random.default_rng(seed)

            def one(w: Any, rng: Any = rng) -> np.ndarray:
                if w.ndim < 2:
                    return np.zeros(w.shape, np.float32)
                scale = np.sqrt(2 / np.prod(w.shape[:-1]))
                return (scale * rng.standard_normal(w.shape)).astype(np.float32)

            out.append(jax.tree.map(one, shapes))
        return out

    def dense(self, kind: str) -> list[Any]:
        """Trained parameters of every seed."""
        if kind not in self._dense:
            starts = self.initial(kind)
            files = [self.cache / f"{kind}-{seed}.npz" for seed in self.seeds]
            if not all(f.exists() for f in files):
                epochs = NETS[kind][1]
                fitted = self.fit(
                    self.model(kind), optax.adam(1e-3), starts, epochs, scan=kind == "mlp"
                )
                self.cache.mkdir(parents=True, exist_ok=True)
                for file, state in zip(files, fitted):
                    np.savez(file, **treelib.flatten(state.params))
            loaded = [dict(np.load(f)) for f in files]
            self._dense[kind] = [
                treelib.map_with_path(lambda p, _, own=own: own[p], start)
                for own, start in zip(loaded, starts)
            ]
        return self._dense[kind]


def assign(model: Any, params: Any) -> None:
    """Writes parameters of the same paths into a module."""
    state = nnx.state(model, nnx.Param)
    nnx.replace_by_pure_dict(state, replaced(nnx.to_pure_dict(state), treelib.flatten(params)))
    nnx.update(model, state)


def replaced(params: Any, leaves: dict[str, Any]) -> Any:
    return treelib.map_with_path(lambda p, w: leaves.get(p, w), params)


def noise(lab: Lab, kind: str = "mlp") -> list[Any]:
    """Random scores of every weight."""
    out = []
    for seed, params in zip(lab.seeds, lab.dense(kind)):
        rng = np.random.default_rng(seed)
        out.append(jax.tree.map(lambda w, rng=rng: rng.random(w.shape, np.float32), params))
    return out


def full(part: Any, params: Any) -> Any:
    """A mask of kernels completed by ones for the other leaves."""
    flat = treelib.flatten(part)
    return treelib.map_with_path(lambda p, w: flat.get(p, np.ones(np.shape(w), bool)), params)


def write(path: pathlib.Path, lab: Lab, found: dict[str, list[Row]], note: str) -> None:
    """Merges entries into the result file, atomically; entries measured otherwise are dropped."""
    old = json.loads(path.read_text()) if path.exists() else {}
    same = old.get("seeds") == lab.seeds and old.get("reduced") == (lab.scale != 1.0)
    entries = old.get("entries", {}) if same else {}
    entries |= {name: [dataclasses.asdict(r) for r in rows] for name, rows in found.items()}
    entries = dict(sorted(entries.items()))
    rows = []
    for name, own in entries.items():
        for one in own:
            cells = Row(**one).cells()
            rows.append([f"{name}: {cells[0]}", *cells[1:]])
    record = {
        "format": report.TABLE,
        "name": path.stem,
        "note": note,
        "seeds": lab.seeds,
        "reduced": lab.scale != 1.0,
        "header": list(HEADER),
        "rows": rows,
        "entries": entries,
        "environment": report.environment(),
    }
    report.write_result(record, path)
