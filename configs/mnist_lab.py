"""What `mnist_methods_lenet_300_100.py` and `mnist_methods_lenet_5.py` share: runs, a result table.

Every method and seed goes into the result file when it is done; what stands there is not repeated,
so that a run may be cut off and taken up again.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from cnnjax import graph, models, pruning, report, training
from cnnjax import tree as treelib
from cnnjax.pruning import gates

Found = dict[str, Any]


class Run:
    """One seed: the dense network, and what every method needs of it.

    Args:
      name: of the network, with one channel and 28x28 images.
      data: ``{"train": (images, labels), "test": ...}``.
      seed: of weights and batches.
      dense: epochs of the dense network (SGD with momentum, cosine, weight decay 5e-4).
      rate: its learning rate.
      batch: images a step.
      call: steps of one compiled call; pays for dense networks only.
      scale: shortens every training.
      cache: file for the dense network.
    """

    def __init__(
        self, name: str, data: dict[str, Any], seed: int, *, dense: float, rate: float, batch: int,
        call: int, scale: float = 1.0, cache: pathlib.Path | None = None,
    ):  # fmt: skip
        self.data, self.seed, self.scale, self.batch, self.call = data, seed, scale, batch, call
        self.model = models.create(name, rngs=nnx.Rngs(seed))
        self.start = nnx.to_pure_dict(nnx.state(self.model, nnx.Param))
        self.kernels = [p for p in treelib.flatten(self.start) if p.endswith("kernel")]
        self.total = treelib.count(self.start)
        if cache is not None and cache.exists():
            with np.load(cache) as stored:
                own = dict(stored)
            self.dense = treelib.map_with_path(lambda p, w: own[p], self.start)
        else:
            self.dense = self.fit(self.sgd(rate, dense, decay=5e-4), self.start, dense).params
            if cache is not None:
                flat: Any = {p: np.asarray(w) for p, w in treelib.flatten(self.dense).items()}
                cache.parent.mkdir(parents=True, exist_ok=True)
                np.savez(cache, **flat)
        self.dense_error = self.error(self.with_params(self.dense))

    def steps(self, epochs: float) -> int:
        """Of so many epochs, in whole calls."""
        count = int(epochs * self.scale * (len(self.data["train"][1]) // self.batch))
        return max(self.call, count // self.call * self.call)

    def sgd(self, rate: float, epochs: float, *, decay: float = 0.0, momentum: float = 0.9) -> Any:
        """Momentum and a cosine; weight decay of everything where asked for."""
        own = optax.sgd(optax.cosine_decay_schedule(rate, self.steps(epochs)), momentum=momentum)
        return optax.chain(optax.add_decayed_weights(decay), own) if decay else own

    def adam(self, rate: float, epochs: float) -> Any:
        """Adam and a cosine."""
        return optax.adam(optax.cosine_decay_schedule(rate, self.steps(epochs)))

    def batches(self) -> Iterator[Any]:
        """Endless shuffled batches, by the seed."""
        image, label = self.data["train"]
        rng = np.random.default_rng(self.seed)
        while True:
            order = rng.permutation(len(label))
            for at in range(0, len(order) - self.batch + 1, self.batch):
                pick = order[at : at + self.batch]
                yield {"image": image[pick], "label": label[pick]}

    def fit(
        self, optimizer: Any, start: Any, epochs: float, extra: Any = None, **hooks: Any
    ) -> Any:
        """The final state of a training run from ``start``."""
        hooks = {"prepare": prepare, **hooks}
        network, state = training.create_state(
            self.model, optimizer, seed=self.seed, params=start, extra=extra
        )
        step = training.make_train_step(
            network, optimizer, config=training.StepConfig(steps_per_call=self.call),
            hooks=training.Hooks(**hooks),
        )  # fmt: skip
        config = training.FitConfig(self.steps(epochs), log_every=0, progress=False)
        state = training.fit(step, state, self.batches(), config).state
        return jax.tree.map(jax.device_get, state)

    def with_params(self, params: Any) -> Any:
        """The network with these parameters, in evaluation mode."""
        graphdef, _, rest = nnx.split(self.model, nnx.Param, ...)
        state = nnx.state(self.model, nnx.Param)
        nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, params))
        model = nnx.merge(graphdef, state, rest)
        model.eval()
        return model

    def error(self, model: Any) -> float:
        """Percent of the test images."""
        image, label = self.data["test"]
        run = nnx.jit(lambda m, x: m(x.astype(jnp.float32) / 255))
        wrong = [
            np.asarray(run(model, image[i : i + 1000])).argmax(-1) != label[i : i + 1000]
            for i in range(0, len(label), 1000)
        ]
        return 100 * float(np.concatenate(wrong).mean())

    def sparse(self, params: Any) -> Found:
        """Error and ratio of a network with zeros; biases count."""
        leaves = [np.asarray(w) for w in jax.tree.leaves(params)]
        flat = treelib.flatten(params)
        return {
            "error": self.error(self.with_params(params)),
            "ratio": self.total / sum(int(np.count_nonzero(w)) for w in leaves),
            "density": {p: float(np.mean(np.asarray(flat[p]) != 0)) for p in self.kernels},
        }

    def shrunk(self, params: Any) -> tuple[Any, dict[str, np.ndarray]]:
        """The network without what is dead, and its arrays."""
        model = self.with_params(params)
        found = graph.trace(model, jnp.zeros((1, 28, 28, 1)))
        keep = pruning.dead_channels(found, jax.tree.map(lambda w: np.asarray(w) != 0, params))
        small = pruning.shrink(model, found, keep)
        flat = treelib.flatten(nnx.to_pure_dict(nnx.state(small, nnx.Param)))
        return small, {p: np.asarray(w) for p, w in flat.items()}


def prepare(batch: Any, key: Any, train: bool) -> Any:
    """uint8 images to [0, 1] on the device."""
    del key, train
    return {**batch, "image": batch["image"].astype(jnp.float32) / 255}


def surgery(
    run: Run, target: Mapping[str, float], epochs: float, rate: float, decay: float
) -> Found:
    """c of each layer such that ``target`` of its weights lie above b at first; SGD.

    Adam would move weights of no use as fast as others, over the threshold and back. Weight decay,
    also of what is removed (as in the released solver), keeps the spliced ones few.
    """
    flat, knobs = treelib.flatten(run.dense), {}
    for path, density in target.items():
        beside = flat[path.replace("kernel", "bias")]
        size = np.abs(np.concatenate([np.ravel(flat[path]), np.ravel(beside)]))
        size = size[size > 0]
        cut = np.quantile(size, 1 - density) / 1.1  # b = 1.1 (mu + c sigma)
        knobs[path] = float((cut - size.mean()) / size.std())
    optimizer = pruning.dynamic_network_surgery(
        run.sgd(rate, epochs, decay=decay), knobs, gamma=1e-4,
        stop=int(0.7 * run.steps(epochs)), bias=True,
    )  # fmt: skip
    hooks = pruning.surgery_hooks()
    state = run.fit(
        optimizer, run.dense, epochs, extra={"mask": pruning.full_mask(run.dense)},
        reparam=hooks.reparam, post_update=hooks.post_update,
    )  # fmt: skip
    params = pruning.apply_mask(state.params, pruning.get_mask(state.opt_state))
    return run.sparse(params) | {"rate": knobs}


def gated(
    run: Run, spec: Mapping[str, str], epochs: float, *, start: Any, inputs: float,
    rate: float = 1e-3, gate_rate: float = 1e-3, droprate: Any = 0.5,
) -> Any:  # fmt: skip
    """Folded parameters after training with hard-concrete gates, lambda 0.1 / N."""
    params = gates.gated(start, dict(spec), key=jax.random.key(run.seed), droprate=droprate)
    labels = {k: jax.tree.map(lambda _, k=k: k == "gates", v) for k, v in params.items()}
    optimizer = optax.multi_transform(
        {True: optax.adam(gate_rate), False: run.adam(rate, epochs)}, labels
    )
    state = run.fit(
        optimizer, params, epochs,
        reparam=gates.reparam(dict(spec)), penalty=gates.penalty(dict(spec), inputs),
    )  # fmt: skip
    return gates.fold(state.params, dict(spec))[0]


def proximal(
    run: Run, spec: Mapping[str, Any], epochs: float, after: float, *, start: Any,
    rate: float = 1e-3,
) -> Any:  # fmt: skip
    """Proximal steps with one threshold for all coordinates of Adam's step, which falls with the
    learning rate; then training of what is left without the operator."""
    schedule = optax.cosine_decay_schedule(1.0, run.steps(epochs))
    optimizer = pruning.forward_backward_splitting(run.adam(rate, epochs), dict(spec), schedule)
    params = run.fit(optimizer, start, epochs).params
    return run.fit(pruning.masked(run.adam(0.5 * rate, after)), params, after).params


def splitting(
    run: Run, spec: Mapping[str, Any], epochs: float, after: float, *, start: Any, rate: float
) -> Any:
    """Forward-backward splitting by SGD with momentum: the penalised loss itself is minimised.

    A momentum of 0.9 makes ten times the step of a gradient, and so must be the operator's. Then
    training of what is left, without the penalty.
    """
    schedule = optax.cosine_decay_schedule(rate, run.steps(epochs))
    optimizer = pruning.forward_backward_splitting(
        run.sgd(rate, epochs), dict(spec), lambda count: 10 * schedule(count)
    )
    params = run.fit(optimizer, start, epochs).params
    return run.fit(pruning.masked(run.sgd(0.1 * rate, after), params), params, after).params


class Method:
    """A function of a run, and what was published: error, and ratio or widths with the source."""

    def __init__(self, work: Callable[[Run], Found], error: str = "", source: str = ""):
        self.work, self.error, self.source = work, error, source


def main(
    doc: str | None, make: Callable[..., Run], methods: Mapping[str, Method], out: pathlib.Path,
    note: str, short: bool = False,
) -> None:  # fmt: skip
    """Runs methods over seeds; finished ones are kept; ``short``: shorter than published."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    parser.add_argument("methods", nargs="+", choices=["all", *methods])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--data_dir", help="TFDS folder with mnist prepared")
    parser.add_argument("--scale", type=float, default=1.0, help="shortens every training")
    parser.add_argument("--out", type=pathlib.Path, default=out)
    parser.add_argument("--cache", type=pathlib.Path, help="folder for the dense networks")
    parser.add_argument("--again", action="store_true", help="repeat what is in the result file")
    help_ = "measure on the last 10,000 training images, train on the others"
    parser.add_argument("--validate", action="store_true", help=help_)
    args = parser.parse_args()
    from cnnjax import data as datalib

    splits = {"train": "train", "test": "test"}
    if args.validate:
        if args.out == out:
            parser.error("--validate needs --out: those figures are for choosing settings")
        splits = {"train": "train[:50000]", "test": "train[50000:]"}
    data: dict[str, Any] = {}
    names = list(methods) if "all" in args.methods else args.methods
    for seed in args.seeds:
        done = {(r["method"], r["seed"]) for r in _runs(args.out, args.scale)}
        left = [n for n in names if args.again or (n, seed) not in done]
        if not left:
            continue
        if not data:
            data = {s: datalib.arrays("mnist", t, data_dir=args.data_dir) for s, t in splits.items()}  # fmt: skip  # noqa: E501
        extent = f"{out.stem}_{seed}_{args.scale:g}_{'v' if args.validate else 't'}.npz"
        run = make(data, seed, args.scale, args.cache / extent if args.cache else None)
        for name in left:
            began = time.process_time()
            found = {"method": name, "seed": seed, "dense_error": run.dense_error}
            found |= methods[name].work(run)
            print(json.dumps({**found, "cpu_seconds": time.process_time() - began}), flush=True)
            write(args.out, found, args.scale, methods, note, short)


def _runs(path: pathlib.Path, scale: float) -> list[Found]:
    old = json.loads(path.read_text()) if path.exists() else {}
    return old.get("runs", []) if old.get("scale") == scale else []


def write(
    path: pathlib.Path, found: Found, scale: float, methods: Mapping[str, Method], note: str,
    short: bool = False,
) -> None:  # fmt: skip
    """Merges one run into the result file, atomically."""
    order = list(methods)
    runs = [r for r in _runs(path, scale) if r["method"] in methods]
    runs = [r for r in runs if (r["method"], r["seed"]) != (found["method"], found["seed"])]
    runs = sorted([*runs, found], key=lambda r: (order.index(r["method"]), r["seed"]))
    rows = magnitude(path.with_name(path.name.replace("mnist_methods_", "mnist_")), path)
    if scale != 1:
        note += f". Every training is shortened to {scale:g} of the epochs in the config"
    for name, method in methods.items():
        own = [r for r in runs if r["method"] == name]
        if own:
            cells = [spread([r[k] for r in own]) for k in ("dense_error", "error", "ratio")]
            cells[2] += "x"
            if "widths" in own[0]:
                widths = np.mean([r["widths"] for r in own], axis=0)
                cells[2] += " (" + "-".join(f"{w:.0f}" for w in widths) + ")"
            rows.append([name, *cells[:2], method.error, cells[2], method.source, str(len(own))])
    record = {
        "format": report.TABLE,
        "name": path.stem,
        "note": note,
        "seeds": sorted({r["seed"] for r in runs}),
        "scale": scale,
        "reduced": short or scale != 1.0,
        "header": ["method", "dense", "error", "published", "left", "published left", "seeds"],
        "rows": rows,
        "runs": runs,
        "environment": report.environment(),
    }  # fmt: skip
    report.write_result(record, path)


def magnitude(path: pathlib.Path, beside: pathlib.Path) -> list[list[str]]:
    """The row of magnitude pruning, from the result file of its own config beside this one's."""
    if path == beside or not path.exists():
        return []
    record = json.loads(path.read_text())
    stages = {s["name"]: s for s in record["stages"]}
    dense, error = (
        report.spread({k: 100 * v for k, v in stages[n]["error"].items()})
        for n in ("dense", "pruned")
    )
    left = f"{report.spread(stages['pruned']['compression'])}x"
    published = record["expected"]["pruned"]
    return [
        ["magnitude", dense, error, f"{100 * published['error']:.2f}", left,
         f"{published['compression']:g}x (Han et al. 2015)", str(len(record["seeds"]))],
    ]  # fmt: skip


def spread(values: Sequence[float]) -> str:
    """Mean (min-max)."""
    return report.spread(
        {"mean": float(np.mean(values)), "min": min(values), "max": max(values)}
    )  # fmt: skip
