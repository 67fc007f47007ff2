"""Steps to a set accuracy: networks grown from a trained one, and the same networks fresh.

    python benchmarks/net2net_steps.py [--seeds 3] [--steps 300]

Chen, Goodfellow, Shlens, ICLR 2016, arXiv 1511.05641. A convolutional network is trained on part of
the UCI digits; a layer is widened (`widen`) or an identity layer put in (`deepen`), and training
goes on. The fresh network has the same shapes and the same learning rate, and also a tenfold one,
since a grown network is usually trained at a tenth of the original rate. Accuracy is measured on
the test split every 10 steps; the mark is the teacher's final accuracy. Writes
``benchmarks/results/net2net_steps.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from cnnjax import data, distillation, graph, models, report, training

EVERY = 10
FIELDS: dict[str, Any] = {"widths": (8, 16), "hidden": (32,), "num_classes": 10}


def curve(model: nnx.Module, rate: float, steps: int, seed: int, arrays: Any) -> list[float]:
    """Test accuracy after 0, 10, 20, ... steps, and the trained model."""
    images, labels, test_images, test_labels = arrays
    optimizer = optax.adam(rate)
    network, state = training.create_state(training.set_mode(model, train=True), optimizer)
    step = training.make_train_step(network, optimizer)
    hits = jax.jit(lambda p, s, x: jnp.argmax(network.model(p, s)(x), -1))
    rng, out = np.random.default_rng(seed), []
    for i in range(steps + 1):
        if i % EVERY == 0:
            found = np.asarray(hits(state.params, state.stats, test_images))
            out.append(float((found == test_labels).mean()))
        if i == steps:
            break
        rows = rng.integers(0, len(images), 64)
        state, _ = step(state, {"image": images[rows], "label": labels[rows]})
    curve.model = training.state_to_model(network, state)  # type: ignore[attr-defined]
    return out


def first(values: list[float], mark: float) -> int | None:
    """Steps until the mark is reached; None: never."""
    return next((i * EVERY for i, v in enumerate(values) if v >= mark), None)


def run(seed: int, steps: int, arrays: Any) -> dict[str, Any]:
    """One seed: the teacher, both grown networks and their fresh twins."""
    example = arrays[0][:64]
    fields = {**FIELDS, "image_size": 8, "in_channels": 1}
    fresh = models.create("plain_cnn", rngs=nnx.Rngs(seed), **fields)
    learnt = curve(fresh, 3e-3, steps, seed, arrays)
    teacher = training.set_mode(curve.model, train=False)  # type: ignore[attr-defined]
    found = graph.trace(teacher, jax.ShapeDtypeStruct((1, *example.shape[1:]), jnp.float32))
    wide, _ = distillation.widen(jax.random.key(seed), teacher, found, "convs/0", 16, noise=0.05)
    deep = distillation.deepen(teacher, "convs/1", example, side="input", rngs=nnx.Rngs(seed))
    twins = {
        "wider": models.create(
            "plain_cnn", rngs=nnx.Rngs(seed + 100), **{**fields, "widths": (16, 16)}
        ),
        "deeper": distillation.deepen(
            models.create("plain_cnn", rngs=nnx.Rngs(seed + 100), **fields),
            "convs/1",
            example,
            side="input",
            rngs=nnx.Rngs(seed),
        ),
    }
    _redraw(twins["deeper"], seed)
    mark = learnt[-1]
    out: dict[str, Any] = {"seed": seed, "teacher": mark}
    for name, grown in (("wider", wide), ("deeper", deep)):
        ours = curve(grown, 3e-4, steps, seed + 1, arrays)
        slow = curve(twins[name], 3e-4, steps, seed + 1, arrays)
        fast = curve(twins[name], 3e-3, steps, seed + 1, arrays)
        out[name] = {
            "start": ours[0],
            "final": ours[-1],
            "steps_to_teacher": first(ours, mark),
            "fresh_start": fast[0],
            "fresh_final": fast[-1],
            "fresh_steps_to_teacher": first(fast, mark),
            "fresh_steps_to_teacher_same_rate": first(slow, mark),
        }
    return out


def _redraw(model: nnx.Module, seed: int) -> None:
    """Random numbers in place of the identity kernel, for a twin that is fresh throughout."""
    state = nnx.state(model, nnx.Param)
    rng = np.random.default_rng(seed)
    for path, leaf in nnx.to_flat_state(state):
        value = leaf.get_value()
        if path[-1] == "kernel" and value.ndim == 4 and value.shape[-1] == value.shape[-2]:
            spread = np.sqrt(2 / np.prod(value.shape[:-1]))
            leaf.set_value(jnp.asarray(rng.standard_normal(value.shape) * spread, jnp.float32))
    nnx.update(model, state)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--data_dir", default=None)
    flags = parser.parse_args()
    arrays = [
        x for split in ("train", "test") for x in data.arrays("digits", split, flags.data_dir)
    ]
    arrays[0], arrays[2] = (np.asarray(x, np.float32) / 255 for x in (arrays[0], arrays[2]))
    runs = []
    for seed in range(flags.seeds):  # the file grows by a seed at a time
        runs.append(run(seed, flags.steps, arrays))
        print(json.dumps(runs[-1]), flush=True)
        record = {
            "what": "steps to the teacher's test accuracy, grown networks against fresh ones",
            "model": "plain_cnn 8-16, 32",
            "data": f"digits, {len(arrays[0])} training and {len(arrays[2])} test images",
            "every": EVERY,
            "steps": flags.steps,
            "runs": runs,
            "environment": report.environment(),
        }
        file = pathlib.Path(__file__).parent / "results" / "net2net_steps.json"
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(record, indent=1) + "\n")
        os.replace(temporary, file)


if __name__ == "__main__":
    main()
