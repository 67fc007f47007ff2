"""Entries of `configs/pruning_digits.py` on tiny networks: noise, unit biases, XOR. Many seeds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from digits_lab import Lab, Row

from cnnjax.pruning import noise, obs, penalties

Forward = Callable[[Any, Any, Any], Any]  # (params, x, key or None) -> outputs


def he(key: jax.Array, sizes: tuple[int, ...]) -> list[Any]:
    """Layers of a dense network: normal of variance 2 / inputs, biases 0."""
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        {"kernel": jax.random.normal(k, (a, b)) * np.sqrt(2 / a), "bias": jnp.zeros(b)}
        for k, a, b in zip(keys, sizes, sizes[1:])
    ]


def mlp(drop: Callable[[Any, Any], Any] | None) -> Forward:
    """ReLU layers with noise behind each hidden one."""

    def forward(params: Any, x: Any, key: Any) -> Any:
        for i, layer in enumerate(params[:-1]):
            x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
            if drop is not None and key is not None:
                x = drop(jax.random.fold_in(key, i), x)
        return x @ params[-1]["kernel"] + params[-1]["bias"]

    return forward


def trained(
    forward: Forward, start: Any, x: Any, y: Any, steps: int, *, every: int, batch: int = 64,
    key: Any,
) -> tuple[Any, Any]:  # fmt: skip
    """(parameters, training accuracy every so many steps) by Adam 1e-3."""
    adam = optax.adam(1e-3)

    def loss(params: Any, k: Any) -> Any:
        pick, own = jax.random.split(k)
        rows = jax.random.randint(pick, (batch,), 0, x.shape[0])
        z = forward(params, x[rows], own)
        return optax.softmax_cross_entropy_with_integer_labels(z, y[rows]).mean()

    def step(carry: Any, k: Any) -> tuple[Any, None]:
        params, state = carry
        updates, state = adam.update(jax.grad(loss)(params, k), state)
        return (optax.apply_updates(params, updates), state), None

    def part(carry: Any, k: Any) -> tuple[Any, Any]:
        carry, _ = jax.lax.scan(step, carry, jax.random.split(k, every))
        return carry, jnp.mean(forward(carry[0], x, None).argmax(-1) == y)

    keys = jax.random.split(key, steps // every)
    (params, _), curve = jax.lax.scan(part, (start, adam.init(start)), keys)
    return params, curve


def dropout(lab: Lab) -> list[Row]:
    """500 images, MLP 64-256-256-10, 100 epochs, 5 seeds: keep probability 0.5 against none."""
    x, y = jnp.asarray(lab.x[:500].reshape(500, -1)), jnp.asarray(lab.y[:500])
    xt, yt = lab.xt.reshape(len(lab.yt), -1), lab.yt
    errors = []
    for drop in (None, lambda k, h: noise.dropout(k, h, 0.5)):
        forward, out = mlp(drop), []

        def run(key: Any, forward: Any = forward) -> Any:
            start = he(key, (64, 256, 256, 10))
            steps = max(8, int(800 * lab.scale))
            return trained(forward, start, x, y, steps, every=8, key=jax.random.fold_in(key, 1))[0]

        fit = jax.jit(run)
        for seed in range(5):
            params = fit(jax.random.key(seed))
            out.append(100 * float(np.mean(np.asarray(forward(params, xt, None)).argmax(-1) != yt)))
        errors.append(out)
    return [
        Row("500 images: error without", None, errors[0], "figure"),
        Row("500 images: error with 0.5", None, errors[1], "figure"),
        Row("mean error with 0.5 not above", None,
            [float(np.mean(errors[1]) <= np.mean(errors[0]))], "mean"),
    ]  # fmt: skip


def evolutional_dropout(lab: Lab) -> list[Row]:
    """Steps to 95 % of the 1,347 training images, MLP 64-256-256-10, 5 seeds."""
    x, y = jnp.asarray(lab.x.reshape(len(lab.y), -1)), jnp.asarray(lab.y)
    steps = []
    for drop in (lambda k, h: noise.dropout(k, h, 0.5), noise.evolutional_dropout):
        forward, out = mlp(drop), []

        def run(key: Any, forward: Any = forward) -> Any:
            start = he(key, (64, 256, 256, 10))
            return trained(forward, start, x, y, 400, every=4, key=jax.random.fold_in(key, 1))[1]

        fit = jax.jit(run)
        for seed in range(5):
            curve = np.asarray(fit(jax.random.key(seed)))
            out.append(4.0 * (1 + int(np.argmax(curve >= 0.95))))
        steps.append(out)
    ratio = [b / a for a, b in zip(*steps)]
    return [
        Row("steps to 95 %, dropout 0.5", None, steps[0], "figure", ""),
        Row("steps to 95 %, evolutional", None, steps[1], "figure", ""),
        Row("evolutional / standard", None, ratio, "figure", "x"),
    ]


def weight_decay_biases(lab: Lab) -> list[Row]:
    """4-bit parity, 12 tanh units, 20 seeds: live units of converged runs, how many converge."""
    x = jnp.asarray([[2.0 * (i >> b & 1) - 1 for b in range(4)] for i in range(16)])
    y = jnp.asarray([float(bin(i).count("1") % 2) for i in range(16)])
    adam, steps = optax.adam(1e-2), max(10, int(6000 * lab.scale))

    def forward(params: Any, x: Any) -> Any:
        h = jnp.tanh(x @ params[0]["kernel"] + params[0]["bias"])
        return (h @ params[1]["kernel"] + params[1]["bias"])[:, 0]

    def fit(key: Any, weight: Any, kind: str) -> tuple[Any, Any]:
        params = he(key, (4, 12, 1))

        def loss(p: Any) -> Any:
            own = {"hidden": {"kernel": p[0]["kernel"]}}
            extra = penalties.unit_bias(own, kind, 1.0)
            return jnp.mean(optax.sigmoid_binary_cross_entropy(forward(p, x), y)) + weight * extra

        def step(carry: Any, _: Any) -> tuple[Any, None]:
            p, state = carry
            updates, state = adam.update(jax.grad(loss)(p), state)
            return (optax.apply_updates(p, updates), state), None

        (p, _), _ = jax.lax.scan(step, (params, adam.init(params)), None, steps)
        solved = jnp.all((forward(p, x) > 0) == (y > 0.5))
        total = jnp.sum(jnp.abs(p[0]["kernel"]), axis=0)
        return solved, jnp.sum(total > 0.1)

    rows, live, share = [], {}, {}
    keys = jax.random.split(jax.random.key(0), 20)
    for name, kind, weight in (
        ("plain", "hyperbolic", 0.0), ("decay", "decay", 1e-3),
        ("hyperbolic", "hyperbolic", 5e-3), ("exponential", "exponential", 5e-3),
    ):  # fmt: skip
        run = jax.jit(jax.vmap(lambda k, w=weight, n=kind: fit(k, w, n)))
        solved, units = map(np.asarray, run(keys))
        live[name] = [float(u) for u in units[solved]] or [12.0]
        share[name] = float(100 * solved.mean())
        rows += [
            Row(f"{name}: live units of 12 when solved", None, live[name], "figure", ""),
            Row(f"{name}: runs that solve parity", None, [share[name]], "figure"),
        ]
    means = {k: np.mean(v) for k, v in live.items()}
    fewer = max(means["hyperbolic"], means["exponential"]) < means["plain"]
    rarer = max(share["hyperbolic"], share["exponential"]) < share["plain"]
    rows += [
        Row("biased runs end with fewer live units", None, [float(fewer)], "mean"),
        Row("and converge less often", None, [float(rarer)], "mean"),
    ]
    return rows


def xor(lab: Lab) -> list[Row]:
    """XOR by 2-2-1 sigmoid units (9 weights), solved runs of 100: one weight goes at once."""
    x = jnp.asarray([[0.0, 0], [0, 1], [1, 0], [1, 1]])
    y = jnp.asarray([0.1, 0.9, 0.9, 0.1])
    adam, steps = optax.adam(2e-2), max(10, int(8000 * lab.scale))

    def forward(w: Any) -> Any:
        h = jax.nn.sigmoid(x @ w[:4].reshape(2, 2) + w[4:6])
        return jax.nn.sigmoid(h @ w[6:8] + w[8])

    def loss(w: Any) -> Any:
        return jnp.mean(jnp.square(forward(w) - y)) + 1e-6 * jnp.sum(jnp.square(w))

    def fit(key: Any) -> Any:
        def step(carry: Any, _: Any) -> tuple[Any, None]:
            w, state = carry
            updates, state = adam.update(jax.grad(loss)(w), state)
            return (optax.apply_updates(w, updates), state), None

        w = jax.random.normal(key, (9,))
        return jax.lax.scan(step, (w, adam.init(w)), None, steps)[0][0]

    runs = jax.jit(jax.vmap(fit))(jax.random.split(jax.random.key(0), 100))
    solves = jax.jit(lambda w: jnp.all((forward(w) > 0.5) == (y > 0.5)))
    error = jax.jit(lambda w: jnp.mean(jnp.square(forward(w) - y)))
    slopes = jax.jit(jax.jacobian(forward))
    runs = [w for w in runs if bool(solves(w)) and float(error(w)) < 1e-3]
    after: dict[str, list[float]] = {"magnitude": [], "OBD": [], "OBS": []}
    worse: dict[str, list[float]] = {k: [] for k in after}
    for w in runs:
        g = slopes(w)
        inverse = obs.inverse_hessian(g, 1e-4)
        found = obs.obs(w, inverse, 1)
        order = {
            "magnitude": jnp.abs(w),
            "OBD": 0.5 * jnp.mean(jnp.square(g), axis=0) * jnp.square(w),
        }
        cut = {name: w.at[jnp.argmin(s)].set(0.0) for name, s in order.items()}
        for name, new in {**cut, "OBS": found.w}.items():
            after[name].append(float(solves(new)))
            worse[name].append(float(error(new)))
    rows = [
        Row(f"XOR: {name}: solved without a weight", None, [100 * float(np.mean(v))], "figure")
        for name, v in after.items()
    ]
    rows += [
        Row(f"XOR: {name}: squared error after", None, [float(np.median(v))], "figure", "")
        for name, v in worse.items()
    ]
    best = np.mean(after["OBS"]) >= max(np.mean(after["OBD"]), np.mean(after["magnitude"]))
    return [*rows, Row("XOR: OBS keeps the function most often", None, [float(best)], "mean")]


ENTRIES = {f.__name__: f for f in (dropout, evolutional_dropout, weight_decay_biases, xor)}
