"""Entries of `configs/pruning_digits.py` on the CNN 16-32-64-10: channels, columns, masks."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from digits_lab import Lab, Row, assign
from flax import nnx

from cnnjax import graph, pruning, training
from cnnjax.pruning import importance, penalties

FIRST, SECOND = "convs/0/kernel", "convs/1/kernel"


class Cutter:
    """Cuts the first convolution of every seed by given scores."""

    def __init__(self, lab: Lab):
        self.lab = lab
        self.models = [lab.build("cnn", p) for p in lab.dense("cnn")]
        self.graph = graph.trace(self.models[0], jnp.zeros((1, 8, 8, 1)))
        self.batches = [jnp.asarray(b) for b in np.split(lab.x[:1300], 5)]

    def cut(self, scores: list[Any], kept: int) -> tuple[list[Any], list[Any], list[float]]:
        """(decisions, shrunk networks, accuracies)."""
        keeps = [
            pruning.select_channels(self.graph, {FIRST: s}, ratio=(16 - kept) / 16) for s in scores
        ]
        small = [pruning.shrink(m, self.graph, k, check=False) for m, k in zip(self.models, keeps)]
        return keeps, small, [self.lab.accuracy_of(m) for m in small]

    def refit(self, keeps: list[Any], small: list[Any]) -> list[float]:
        """Accuracies after least squares of the next layer."""
        out = []
        for m, s, k in zip(self.models, small, keeps):
            better = pruning.reconstruct(m, s, self.graph, k, self.batches, include=("convs/1",))
            out.append(self.lab.accuracy_of(better))
        return out

    def next_layer(self, method: str, kept: int) -> list[Any]:
        return [
            pruning.next_layer_scores(
                m, self.graph, self.batches, method=method, ratio=(16 - kept) / 16,
                include="convs/1",
            )[FIRST]
            for m in self.models
        ]  # fmt: skip

    def finetune(self, small: list[Any], epochs: float) -> list[float]:
        starts = [nnx.to_pure_dict(nnx.state(m, nnx.Param)) for m in small]
        fitted = self.lab.fit(small[0], optax.adam(1e-3), starts, epochs, scan=False)
        for m, state in zip(small, fitted):
            assign(m, state.params)
        return [self.lab.accuracy_of(m) for m in small]


def above(a: list[float], b: list[float]) -> list[float]:
    return [float(x > y) for x, y in zip(a, b)]


def filter_noise(lab: Lab) -> list[Any]:
    return [np.random.default_rng(s).random(16).astype(np.float32) for s in lab.seeds]


def lasso_channel_pruning(lab: Lab) -> list[Row]:
    """16 to 4 channels, no fine-tuning; a random selection beside it (section 7, test 5)."""
    c = Cutter(lab)
    keeps, small, raw = c.cut(c.next_layer("lasso", 4), 4)
    fitted = c.refit(keeps, small)
    keeps, small, other = c.cut(filter_noise(lab), 4)
    return [
        Row("4 of 16, selection alone", (66, 94), raw),
        Row("4 of 16, least squares", (97.3, 98.7), fitted),
        Row("least squares above selection", None, above(fitted, raw), "claim"),
        Row("random 4 of 16", None, other, "figure"),
        Row("random 4 of 16, least squares", (97, 99), c.refit(keeps, small)),
    ]


def thinet(lab: Lab) -> list[Row]:
    c, rows = Cutter(lab), []
    for kept, first, last in ((8, (93.1, 96.9), (98.4, 98.9)), (4, (66, 96), (98.2, 98.4))):
        keeps, small, raw = c.cut(c.next_layer("thinet", kept), kept)
        rows += [
            Row(f"{kept} of 16, selection alone", first, raw),
            Row(f"{kept} of 16, reconstruction", last, c.refit(keeps, small)),
        ]
    return rows


def l1_filter_pruning(lab: Lab) -> list[Row]:
    c, rows = Cutter(lab), []
    scores = [importance.l1(p)["convs"]["0"]["kernel"] for p in lab.dense("cnn")]
    for kept, first, last in ((8, (90, 97.6), (98.4, 98.9)), (4, (76, 81), (97.3, 98.0))):
        _, small, raw = c.cut(scores, kept)
        rows += [
            Row(f"{kept} of 16", first, raw),
            Row(f"{kept} of 16, 5 epochs", last, c.finetune(small, 5)),
        ]
    return rows


def example_loss(lab: Lab) -> Callable[..., Any]:
    logits = lab.network("cnn")[2]

    def loss(params: Any, example: Any) -> Any:
        z = logits(params, example[0][None])
        return optax.softmax_cross_entropy_with_integer_labels(z, example[1][None])[0]

    return loss


def fisher_pruning(lab: Lab) -> list[Row]:
    c = Cutter(lab)
    scores = [
        importance.fisher(p, example_loss(lab), [(lab.x, lab.y)], chunk=64)
        for p in lab.dense("cnn")
    ]
    raw = c.cut([s["convs"]["0"]["kernel"] for s in scores], 8)[2]
    return [Row("8 of 16", (94.9, 97.6), raw)]


def error_on_training(lab: Lab) -> Callable[[Any], Any]:
    """Masked parameters -> error of the training images (the search never sees the test set)."""
    logits = lab.network("cnn")[2]
    x, y = jnp.asarray(lab.x), jnp.asarray(lab.y)
    return lambda params: jnp.mean(jnp.argmax(logits(params, x), -1) != y)


def random_mask_pruning(lab: Lab) -> list[Row]:
    """The best of 100 masks of conv1 on the training images, no retraining."""
    rows = []
    for ratio, kept, reach, base in ((0.5, 8, (97.6, 98.2), (93.3, 96.2)),
                                     (0.75, 4, (88.9, 94.7), (56, 72))):  # fmt: skip
        own = []
        for seed, params in zip(lab.seeds, lab.dense("cnn")):
            best = pruning.best_of_n(
                jax.random.key(seed), params, error_on_training(lab), ratio=ratio, count=100,
                include=FIRST, batch=4,
            )  # fmt: skip
            own.append(lab.accuracy("cnn", pruning.apply_mask(params, best.mask)))
        other = Cutter(lab).cut(filter_noise(lab), kept)[2]
        rows += [
            Row(f"{kept} of 16, best of 100", reach, own),
            Row(f"{kept} of 16, random", base, other, "figure"),
        ]
    return rows


def particle_filter_pruning(lab: Lab) -> list[Row]:
    """conv2, 8 of 32 maps, 96 evaluations: generations of 16 against 96 random vectors."""
    own, other = [], []
    for seed, params in zip(lab.seeds, lab.dense("cnn")):
        evaluate = error_on_training(lab)

        def bits(b: Any, params: Any = params, evaluate: Any = evaluate) -> Any:
            mask = pruning.bits_to_mask(params, b, [SECOND], "filter")
            return evaluate(pruning.apply_mask(params, mask))

        key = jax.random.key(seed)
        moved = pruning.particle_filter(key, bits, 32, 8, particles=16, generations=5, batch=4)
        drawn = pruning.particle_filter(key, bits, 32, 8, particles=96, generations=0, batch=4)
        own.append(100 * float(moved.error))
        other.append(100 * float(drawn.error))
    return [
        Row("error on the search's images", None, own, "figure"),
        Row("best of as many random", None, other, "figure"),
        Row("not worse on average", None, [float(np.mean(own) <= np.mean(other))], "mean"),
    ]


def masked_training(lab: Lab, starts: list[Any], masks: list[Any], epochs: float) -> list[Any]:
    starts = [pruning.apply_mask(p, m) for p, m in zip(starts, masks)]
    fitted = lab.fit(lab.model("cnn"), pruning.masked(optax.adam(1e-3)), starts, epochs, scan=False)
    return [s.params for s in fitted]


def group_wise_brain_damage(lab: Lab) -> list[Row]:
    """10 epochs with the penalty, 43 of conv2's 144 columns kept, 10 epochs; the thin product."""
    hooks = training.Hooks(
        penalty=lambda p, c: penalties.group_lasso(p, {"column": 3e-3}, include=SECOND)
    )
    start = lab.dense("cnn")
    fitted = lab.fit(lab.model("cnn"), optax.adam(1e-3), start, 10, hooks=hooks, scan=False)
    params = [s.params for s in fitted]
    masks = [pruning.magnitude_mask(p, 0.7, granularity="column", include=SECOND) for p in params]
    tuned = masked_training(lab, params, masks, 10)
    own = [lab.accuracy("cnn", p) for p in tuned]
    dense = [lab.accuracy("cnn", p) for p in start]
    loss = [max(0.0, d - o) for d, o in zip(dense, own)]  # a gain counts as no loss
    model = lab.build("cnn", tuned[0])
    conv = model.convs[1]
    thin = pruning.ThinConv(conv, masks[0]["convs"][1]["kernel"])
    x = jnp.asarray(np.random.default_rng(0).random((64, 8, 8, 16), np.float32))
    whole, part = nnx.jit(lambda m, x: m(x)), nnx.jit(lambda m, x: m(x))
    same = float(jnp.max(jnp.abs(whole(conv, x) - part(thin, x))))
    a, b = alternating([lambda: whole(conv, x), lambda: part(thin, x)])
    return [
        Row("30 % of 144 columns", None, own, "figure"),
        Row("points lost", (0, 1), loss, "about", "points"),
        Row("thin product equals masked convolution", None, [float(same < 1e-4)], "mean"),
        Row("time of the dense convolution / thin product", None, [a / b], "figure", "x"),
    ]


def alternating(calls: list[Callable[[], Any]], rounds: int = 60) -> list[float]:
    """The cheapest round of each, taking turns."""
    best = [float("inf")] * len(calls)
    for _ in range(rounds):
        for i, call in enumerate(calls):
            began = time.perf_counter()
            jax.block_until_ready(call())
            best[i] = min(best[i], time.perf_counter() - began)
    return best


def pruning_granularity(lab: Lab) -> list[Row]:
    """A quarter of conv2 left as maps, kernels or weights, 5 epochs: finer is no worse."""
    rows, mean = [], {}
    for name in ("filter", "kernel", "weight"):
        masks = [
            pruning.magnitude_mask(p, 0.75, granularity=name, include=SECOND)
            for p in lab.dense("cnn")
        ]
        own = [lab.accuracy("cnn", p) for p in masked_training(lab, lab.dense("cnn"), masks, 5)]
        mean[name] = np.mean(own)
        rows.append(Row(f"conv2, 75 % by {name}, 5 epochs", None, own, "figure"))
    fine = mean["weight"] >= mean["filter"] - 0.7 and mean["kernel"] >= mean["filter"] - 0.7
    return [*rows, Row("finer at least as accurate", None, [float(fine)], "mean")]


def average_percentage_of_zeros(lab: Lab) -> list[Row]:
    """Rank correlation of conv2's scores with the loss increase of removing one map."""
    from scipy.stats import spearmanr

    found: dict[str, list[float]] = {"APoZ": [], "l1": [], "Fisher": []}
    network, stats, logits = lab.network("cnn")
    x, y = jnp.asarray(lab.x), jnp.asarray(lab.y)

    @jax.jit
    def losses(params: Any) -> Any:
        def one(i: Any) -> Any:
            bits = jnp.arange(32) != i
            mask = pruning.bits_to_mask(params, bits, [SECOND], "filter")
            z = logits(pruning.apply_mask(params, mask), x)
            return optax.softmax_cross_entropy_with_integer_labels(z, y).mean()

        return jax.lax.map(one, jnp.arange(32))

    def collect(params: Any, batch: Any) -> Any:
        model = network.model(params, stats)
        hidden = jax.nn.relu(model.convs[0](batch))
        return {SECOND: jax.nn.relu(model.convs[1](hidden))}

    for params in lab.dense("cnn"):
        rise = np.asarray(losses(params))
        fisher = importance.fisher(params, example_loss(lab), [(lab.x, lab.y)], chunk=64)
        scores = {
            "APoZ": importance.apoz(params, collect, [x])["convs"]["1"]["kernel"],
            "l1": np.asarray(importance.l1(params)["convs"]["1"]["kernel"]).sum((0, 1, 2)),
            "Fisher": fisher["convs"]["1"]["kernel"],
        }
        for name, own in scores.items():
            correlation: Any = spearmanr(np.asarray(own), rise)
            found[name].append(float(correlation[0]))
    return [Row(f"rank correlation of {n}", None, v, "figure", "") for n, v in found.items()]


def structured_surgery(lab: Lab) -> list[Row]:
    """Time of 256 images with 16, 8 and 4 maps of conv1: shrunk falls, gated does not."""
    c, x = Cutter(lab), jnp.asarray(lab.x[:256])
    c.models = c.models[:1]
    run = nnx.jit(lambda m, x: m(x))
    calls = [lambda: run(c.models[0], x)]
    for kept in (8, 4):
        _, (small,), _ = c.cut(noise_of_filters(), kept)
        calls.append(lambda small=small: run(small, x))
    logits, params = lab.network("cnn")[2], jax.tree.map(jnp.asarray, lab.dense("cnn")[0])
    mask = pruning.magnitude_mask(params, 0.75, granularity="filter", include=FIRST)
    gated = pruning.apply_mask(params, mask)
    calls += [lambda: logits(params, x), lambda: logits(gated, x)]
    whole, half, quarter, dense, masked = alternating(calls)
    return [
        Row("time, 8 of 16 shrunk", None, [half / whole], "figure", "x"),
        Row("time, 4 of 16 shrunk", None, [quarter / whole], "figure", "x"),
        Row("time, 4 of 16 gated", None, [masked / dense], "figure", "x"),
        Row("shrunk falls", None, [float(quarter < half < whole)], "mean"),
        Row("gated does not", None, [float(masked > 0.9 * dense)], "mean"),
    ]


def noise_of_filters() -> list[Any]:
    return [np.random.default_rng(0).random(16).astype(np.float32)]


ENTRIES: dict[str, Callable[[Lab], list[Row]]] = {
    f.__name__: f
    for f in (
        lasso_channel_pruning, thinet, l1_filter_pruning, fisher_pruning, random_mask_pruning,
        particle_filter_pruning, group_wise_brain_damage, pruning_granularity,
        average_percentage_of_zeros, structured_surgery,
    )
}  # fmt: skip
