"""Channels chosen by any criterion at the same widths, without training: made to be compared."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from cnnjax import graph, pruning, training, tree
from cnnjax.errors import did_you_mean
from cnnjax.graph.capture import capture
from cnnjax.pipeline.context import Context
from cnnjax.pipeline.registry import Carry, Outcome, stage
from cnnjax.pipeline.stages.factorize import accuracy_of, example_image, recalibrated
from cnnjax.pipeline.stages.masking import params_of, with_params
from cnnjax.pruning.aggregate import NORMALIZE

_WEIGHTS = ("l1", "l2", "bn_scale", "fpgm", "random")
_READERS = ("lasso", "thinet")
_GRADIENTS = ("fisher", "fisher_cost")
_ACTIVATIONS = ("apoz", "hrank")
METHODS = (*_WEIGHTS, *_READERS, *_GRADIENTS, *_ACTIVATIONS)


@stage("select")
@dataclasses.dataclass(frozen=True)
class Select:
    """Removes whole channels by one criterion; train behind it, or as a branch of `Branches`.

    ``l1`` (Li et al. 2017), ``bn_scale`` (network slimming, Liu et al. 2017), ``fpgm``, ``random``;
    ``lasso`` (He et al. 2017) and ``thinet`` (Luo et al. 2017) by what the next layers compute;
    ``fisher`` (Theis et al. 2018) by gradients of the loss, ``fisher_cost`` per saved MAC, one
    channel at a time; ``apoz`` (Hu et al. 2016) and ``hrank`` by activations. Without ``ratio`` and
    ``macs`` nothing goes: the baseline.

    Attributes:
      method: one of those.
      ratio: ``{glob of group names: share to remove}``, the same widths for every method.
      macs: share of the MACs that may be left, channels of all groups competing; 0: use ``ratio``.
      normalize: what the scores of a group are divided by before groups compete (see
        `pruning.select_channels`).
      images: training images for the methods that look at data.
      readers: globs of the layers whose sums ``lasso`` and ``thinet`` keep.
      refit: least squares of the reading layers' kernels on the same images (He et al.).
      fresh: weights drawn anew: the small network from scratch.
      recalibrate: training images whose BatchNorm statistics the small network takes over.
    """

    method: str = "l1"
    ratio: Mapping[str, float] = dataclasses.field(default_factory=dict)
    macs: float = 0.0
    normalize: str = "mean"
    images: int = 512
    readers: tuple[str, ...] = ("**",)
    refit: bool = False
    fresh: bool = False
    recalibrate: int = 0
    restructures = True

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}.{did_you_mean(self.method, METHODS)}")
        if self.ratio and self.macs:
            raise ValueError("give ratio or macs, not both")
        if self.method == "fisher_cost" and self.ratio:
            raise ValueError("fisher_cost weighs damage against MACs: give macs, not ratio")
        if self.normalize not in NORMALIZE:
            known = did_you_mean(self.normalize, NORMALIZE)
            raise ValueError(f"unknown normalize {self.normalize!r}.{known}")
        if not 0 <= self.macs < 1:
            raise ValueError(f"macs is {self.macs}; expected a share in [0, 1)")
        for glob, share in self.ratio.items():
            if not 0 <= share < 1:
                raise ValueError(f"ratio.{glob} is {share}; expected a share in [0, 1)")
        if self.images < 1 or self.recalibrate < 0:
            raise ValueError(
                f"images is {self.images} and recalibrate {self.recalibrate}; numbers of images"
            )

    def run(self, network: Carry, context: Context) -> Outcome:
        """See `cnnjax.pipeline.registry`."""
        if network.mask is not None:
            raise ValueError("channels are removed before weights: put this stage before masks")
        model = training.set_mode(network.model, train=False)
        image = example_image(context)
        found = graph.trace(model, jnp.asarray(image))
        metrics: dict[str, Any] = {"accuracy_before": accuracy_of(model, context)}
        small, keep = model, pruning.Keep.of(found, found.alive())
        if self.ratio or self.macs:
            batches = self._images(context)
            keep = self._keep(model, found, batches, context)
            small = training.set_mode(pruning.shrink(model, found, keep), train=False)
            metrics["accuracy_after_shrinking"] = accuracy_of(small, context)
            if self.refit:
                pixels = [b["image"] for b in batches]
                small = pruning.reconstruct(model, small, found, keep, pixels, include=self.readers)
                metrics["accuracy_after_refitting"] = accuracy_of(small, context)
        if self.fresh:
            small = restarted(small, context.key("fresh"))
        if self.recalibrate:
            small = recalibrated(small, context, self.recalibrate)
        old, new = graph.profile(model, image), graph.profile(small, image)
        metrics |= {
            "macs_share": new.macs / old.macs,
            "params_share": new.params / old.params,
            "widths": {name: int(m.sum()) for name, m in keep.groups},
        }
        return Outcome(dataclasses.replace(network, model=small), metrics)

    def _images(self, context: Context) -> list[Any]:
        """About so many images of the training stream with their labels, in batches."""
        if self.method in _WEIGHTS and not self.refit:
            return []
        loader = context.train_loader()
        try:
            wanted = max(1, math.ceil(self.images / context.data.batch_size))
            out: list[Any] = []
            for batch in loader:
                out.append({k: batch[k] for k in ("image", "label")})
                if len(out) == wanted:
                    return out
            return out
        finally:
            loader.close()

    def _keep(self, model: Any, found: Any, batches: list[Any], context: Context) -> Any:
        budget: dict[str, Any] = {"ratio": dict(self.ratio)} if self.ratio else {"macs": self.macs}
        if self.macs:
            budget |= {"scope": "global", "normalize": self.normalize}
        pixels = [b["image"] for b in batches]
        if self.method in _WEIGHTS:
            params = params_of(model)
            score = pruning.importance.get(self.method)
            random = (context.key("scores"),) if self.method == "random" else ()
            scores = score(params, *random)
        elif self.method in _READERS:
            scores = self._by_readers(model, found, pixels)
        elif self.method in _GRADIENTS:
            fisher = pruning.map_fisher(params_of(model), found, example_loss(model), batches)
            if self.method == "fisher_cost":
                alive, _ = pruning.fisher_select(found, fisher, beta="auto", macs=self.macs)
                return pruning.Keep.of(found, alive)
            scores = by_producer(found, fisher)
        else:
            scores = by_producer(found, read_scores(model, found, pixels, self.method))
        return pruning.select_channels(found, scores, **budget)

    def _by_readers(self, model: Any, found: Any, pixels: Sequence[Any]) -> dict[str, Any]:
        """The lasso's strength depends on how many channels go: layers of one share together."""
        share = np.full(found.num_atoms, 1 - self.macs if self.macs else 0.0)
        for glob, value in reversed(list(self.ratio.items())):
            for group in found.groups:
                if tree.glob_match(glob, group.name):
                    share[group.atoms] = value
        readers: dict[float, list[str]] = {}
        for layer in found.layers:
            if layer.kind not in ("conv", "dense") or layer.in_labels is None:
                continue
            read = layer.in_labels[layer.in_labels >= 0]
            if len(read) and share[read].max() > 0 and tree.match_any(self.readers, layer.path):
                readers.setdefault(float(share[read].max()), []).append(layer.path)
        scores: dict[str, Any] = {}
        for value, paths in readers.items():
            scores |= pruning.next_layer_scores(
                model, found, pixels, method=self.method, ratio=value, include=tuple(paths)
            )
        return scores


def example_loss(model: nnx.Module) -> Callable[[Any, Any], Any]:
    """``(params, {"image", "label"}) -> cross-entropy`` of one example in evaluation mode."""
    network, state = training.create_state(model, optax.set_to_zero())
    stats = state.stats

    def loss(params: Any, example: Any) -> Any:
        logits = network.model(params, stats)(example["image"][None])
        return -jax.nn.log_softmax(logits)[0, example["label"]]

    return loss


def by_producer(found: Any, values: np.ndarray) -> dict[str, np.ndarray]:
    """Scores of atoms as scores of the variables that make them, for `select_channels`."""
    out = {}
    for group in found.groups:
        for path, axis in group.producers:
            last = len(found.shapes[path]) - 1
            if last >= 1 and axis == last and not np.isnan(values[group.atoms]).any():
                labels = found.axes[path, axis].labels
                own = values[np.maximum(labels, 0)]
                out[path] = np.where((labels >= 0) & ~np.isnan(own), own, np.nanmax(values))
    return out


def read_scores(model: nnx.Module, found: Any, batches: Sequence[Any], kind: str) -> np.ndarray:
    """APoZ or HRank of every atom, by what the convolutions that read it receive; NaN: not read."""
    readers = {
        layer.path: np.asarray(layer.in_labels)
        for layer in found.layers
        if layer.kind in ("conv", "dense")
        if layer.in_labels is not None and (layer.in_labels >= 0).any()
    }
    graphdef, state = nnx.split(model)

    def collect(state: Any, batch: Any) -> Any:
        taps: Any = dict.fromkeys(readers, "input")
        return capture(nnx.merge(graphdef, state, copy=True), taps)(batch)[1]

    scores = pruning.importance.activation_scores(state, collect, batches, (kind,))[kind]
    total, count = np.zeros(found.num_atoms), np.zeros(found.num_atoms)
    for path, values in tree.flatten(scores).items():
        labels = readers[path]
        on = labels >= 0
        np.add.at(total, labels[on], np.asarray(values, np.float64)[on])
        np.add.at(count, labels[on], 1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def restarted(model: nnx.Module, key: jax.Array) -> nnx.Module:
    """The same structure, weights drawn anew: He-normal kernels, scales 1, biases 0."""
    he = jax.nn.initializers.he_normal()

    def one(path: str, leaf: Any) -> Any:
        name = path.rpartition("/")[2]
        if leaf.ndim >= 2:
            own = jax.random.fold_in(key, zlib.crc32(path.encode()))
            return he(own, leaf.shape, leaf.dtype)
        return jnp.ones_like(leaf) if name == "scale" else jnp.zeros_like(leaf)

    model = with_params(model, tree.map_with_path(one, params_of(model)))
    graphdef, stats, rest = nnx.split(model, nnx.BatchStat, ...)

    def none(path: str, leaf: Any) -> Any:
        return jnp.ones_like(leaf) if path.endswith("var") else jnp.zeros_like(leaf)

    nnx.replace_by_pure_dict(stats, tree.map_with_path(none, nnx.to_pure_dict(stats)))
    return nnx.merge(graphdef, stats, rest, copy=True)
