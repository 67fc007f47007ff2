"""Time each formulation of depthwise, grouped and 1x1 convolution against the native one.

    python benchmarks/conv_forms.py [--out FILE] [--rounds 7] [--quick] [--networks] [--only 3 4]

For each layer shape and each part (forward, gradient of the input, gradient of the kernel) the
forms run in turn, ``--rounds`` times, and the fastest round of each counts: on a shared machine the
minimum is what the code needs. Only ratios are written (native time / form time: above 1, the form
is faster; of channel shuffle, native is the transposition). The choice in ``cnnjax/ops/choice.py``
follows these figures; ``benchmarks/tuned_forms.py`` measures a network's own layers on any device.
``--networks`` compares whole networks, forward and gradient, with every convolution native and the
shuffle a transposition against the chosen forms. ``--only`` measures some cases again, by number;
the file's other rows stay.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from records import machine, write

from cnnjax import models, ops
from cnnjax.ops import choice, primitives, shuffle
from cnnjax.ops.geometry import ConvCase, ConvSpec, ShuffleCase, kind_of

SAME = {1: ((0, 0), (0, 0)), 3: ((1, 1), (1, 1)), 5: ((2, 2), (2, 2)), 7: ((3, 3), (3, 3))}

# (batch, size, channels in, channels out, kernel, stride, groups)
CASES = [
    # depthwise: MobileNet and ShuffleNet at their resolutions, a CIFAR size, 5x5, multiplier 8
    (1, 112, 32, 32, 3, 1, 32),
    (8, 112, 32, 32, 3, 1, 32),
    (8, 112, 96, 96, 3, 2, 96),
    (8, 56, 144, 144, 3, 1, 144),
    (8, 28, 192, 192, 3, 2, 192),
    (1, 14, 512, 512, 3, 1, 512),
    (8, 14, 512, 512, 3, 1, 512),
    (8, 7, 960, 960, 3, 1, 960),
    (32, 16, 128, 128, 3, 1, 128),
    (8, 28, 64, 64, 5, 1, 64),
    (4, 224, 3, 24, 7, 2, 3),
    # grouped 1x1: ShuffleNet
    (8, 28, 240, 60, 1, 1, 3),
    (8, 28, 384, 96, 1, 1, 8),
    (8, 14, 480, 120, 1, 1, 3),
    (8, 7, 1536, 384, 1, 1, 8),
    (1, 14, 480, 120, 1, 1, 3),
    # grouped 3x3: AlexNet, ResNeXt
    (8, 27, 96, 256, 5, 1, 2),
    (8, 13, 384, 384, 3, 1, 2),
    (8, 28, 256, 256, 3, 1, 32),
    (8, 14, 512, 512, 3, 1, 32),
    (8, 14, 512, 512, 3, 1, 8),
    # 1x1: ResNet, MobileNet
    (8, 56, 64, 256, 1, 1, 1),
    (8, 56, 256, 64, 1, 1, 1),
    (8, 56, 256, 512, 1, 2, 1),
    (8, 112, 32, 64, 1, 1, 1),
    (8, 14, 512, 512, 1, 1, 1),
    (8, 7, 320, 1280, 1, 1, 1),
    (1, 14, 512, 512, 1, 1, 1),
    (32, 16, 64, 64, 1, 1, 1),
    # dense kernels on maps smaller than they are, and just large enough: CIFAR VGG, Inception
    (32, 1, 256, 256, 3, 1, 1),
    (1, 2, 512, 512, 3, 1, 1),
    (32, 2, 512, 512, 3, 1, 1),
    (32, 4, 256, 256, 3, 2, 1),
    (32, 4, 512, 512, 3, 1, 1),
    (32, 4, 128, 128, 5, 1, 1),
]
# channel shuffle of ShuffleNet's inner maps: (batch, size, channels, groups)
SHUFFLES = [(8, 28, 60, 3), (8, 14, 120, 3), (1, 14, 120, 3), (8, 28, 96, 8), (8, 7, 384, 8)]
FORMS = {
    "depthwise": ("native", "shift"),
    "grouped": ("native", "dot"),
    "pointwise": ("native", "dot"),
    "dense": ("native", "dot"),
}


def _functions(case: tuple[int, ...], form: str) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    n, size, c_in, c_out, k, stride, groups = case
    spec = ConvSpec((stride, stride), SAME[k], (1, 1), groups)
    rng = np.random.default_rng(0)
    x = jax.device_put(rng.standard_normal((n, size, size, c_in), np.float32))
    kernel = jax.device_put(rng.standard_normal((k, k, c_in // groups, c_out), np.float32))
    ct = jax.device_put(
        rng.standard_normal((n, *spec.out_size((size, size), (k, k)), c_out), np.float32)
    )
    triple = primitives.TRIPLES[kind_of(kernel.shape, groups)]
    common = {"spec": spec, "form": form, "precision": None}

    def bind(primitive: Any, **static: Any) -> Any:
        return jax.jit(lambda a, b: primitive.bind(a, b, **common, **static))

    return {
        "forward": (bind(triple.conv), (x, kernel)),
        "input_grad": (bind(triple.input_grad, size=(size, size)), (ct, kernel)),
        "kernel_grad": (bind(triple.kernel_grad, kernel_size=(k, k)), (x, ct)),
    }


def _once(fn: Any, args: tuple[Any, ...], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        out = fn(*args)
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / repeats


def measure(case: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    """Ratios native / form for the three parts of one layer."""
    n, size, c_in, c_out, k, stride, groups = case
    kind = kind_of((k, k, c_in // groups, c_out), groups)
    built = {form: _functions(case, form) for form in FORMS[kind]}
    rows = []
    for part in ("forward", "input_grad", "kernel_grad"):
        best = dict.fromkeys(built, float("inf"))
        repeats = {}
        for form, parts in built.items():
            fn, args = parts[part]
            jax.block_until_ready(fn(*args))
            once = _once(fn, args, 1)
            best[form] = once
            repeats[form] = int(max(1, min(20, 0.02 / max(once, 1e-5))))
        for _ in range(rounds):
            for form, parts in built.items():
                # a form that is far behind needs no more rounds
                if best[form] < 20 * min(best.values()):
                    best[form] = min(best[form], _once(*parts[part], repeats[form]))
        spec = ConvSpec((stride, stride), SAME[k], (1, 1), groups)
        layer = ConvCase(spec, (n, size, size, c_in), (k, k, c_in // groups, c_out))
        chosen = choice.choose(layer, part, platform=jax.default_backend())
        rows.append(
            {
                "kind": kind,
                "part": part,
                "batch": n,
                "size": size,
                "channels": [c_in, c_out],
                "kernel": k,
                "stride": stride,
                "groups": groups,
                "native_over_form": {
                    f: round(best["native"] / t, 2) for f, t in best.items() if f != "native"
                },
                "chosen": chosen,
                "chosen_over_best": round(best[chosen] / min(best.values()), 2),
            }
        )
    return rows


def _permuted(x: jax.Array, groups: int) -> jax.Array:
    """Channel shuffle as a gather."""
    order = np.arange(x.shape[-1]).reshape(groups, -1).T.reshape(-1)
    return jnp.take(x, order, axis=-1, mode="clip", unique_indices=True)


def measure_shuffle(case: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    """Ratios transposition / form of one channel shuffle and its transpose."""
    n, size, channels, groups = case
    x = jax.device_put(
        np.random.default_rng(0).standard_normal((n, size, size, channels), np.float32)
    )
    forms = {"native": shuffle.transposed, "stack": shuffle.stacked, "gather": _permuted}
    shuffled = ShuffleCase(x.shape, groups)
    chosen = choice.choose_shuffle(shuffled, platform=jax.default_backend())
    rows = []
    for part in ("forward", "input_grad"):
        best, built = {}, {}
        for form, rearrange in forms.items():

            def run(x: Any, rearrange: Any = rearrange) -> Any:
                return rearrange(x, groups)

            if part == "input_grad":
                run = jax.linear_transpose(run, x)
            built[form] = jax.jit(run)
            jax.block_until_ready(built[form](x))
            best[form] = float("inf")
        for _ in range(rounds):
            for form, fn in built.items():
                best[form] = min(best[form], _once(fn, (x,), 20))
        ratios = {f: round(best["native"] / t, 2) for f, t in best.items() if f != "native"}
        rows.append(
            {
                "kind": "shuffle",
                "part": part,
                "batch": n,
                "size": size,
                "channels": channels,
                "groups": groups,
                "native_over_form": ratios,
                "chosen": chosen,
                "chosen_over_best": round(best[chosen] / min(best.values()), 2),
            }
        )
    return rows


# (name, image size, batch, fields)
NETWORKS: list[tuple[str, int, int, dict[str, Any]]] = [
    ("mobilenet_v1", 96, 8, {}),
    ("mobilenet_v2", 96, 8, {}),
    ("shufflenet_v1_g3", 96, 8, {}),
    ("resnet50", 96, 8, {}),
    ("cic", 32, 8, {}),
    ("vgg16_cifar", 32, 8, {}),
    ("resnext50_32x4d", 96, 8, {}),
]


def _network(name: str, size: int, batch: int, fields: dict[str, Any], native: bool) -> Any:
    """Compiled evaluation pass and gradient of a network, with their arguments."""
    model = models.create(name, rngs=nnx.Rngs(0), **fields)
    shuffled = ops.channel_shuffle
    if native:
        for _, layer in nnx.iter_graph(model):
            if isinstance(layer, nnx.Conv):
                layer.conv_general_dilated = jax.lax.conv_general_dilated
        ops.channel_shuffle = shuffle.transposed
    x = jnp.asarray(np.random.default_rng(0).standard_normal((batch, size, size, 3)), jnp.float32)
    parts = {}
    for part in ("forward", "gradient"):
        model.train() if part == "gradient" else model.eval()
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)

        def run(params: Any, x: Any, graphdef: Any = graphdef, rest: Any = rest) -> Any:
            return nnx.merge(graphdef, params, rest, copy=True)(x)

        def loss(params: Any, x: Any, run: Any = run) -> Any:
            return jnp.mean(jnp.square(run(params, x)))

        fn = jax.jit(run if part == "forward" else jax.grad(loss))
        start = time.perf_counter()
        compiled = fn.lower(params, x).compile()
        parts[part] = (compiled, (params, x), time.perf_counter() - start)
    ops.channel_shuffle = shuffled
    return parts


def measure_network(
    case: tuple[str, int, int, dict[str, Any]], rounds: int
) -> list[dict[str, Any]]:
    """Ratios all-native / chosen forms of one network."""
    name, size, batch, fields = case
    built = {
        form: _network(name, size, batch, fields, form == "native") for form in ("native", "auto")
    }
    rows = []
    for part in ("forward", "gradient"):
        best = dict.fromkeys(built, float("inf"))
        for _ in range(rounds):
            for form, parts in built.items():
                fn, args, _ = parts[part]
                best[form] = min(best[form], _once(fn, args, 1))
        rows.append(
            {
                "network": name,
                "part": part,
                "batch": batch,
                "size": size,
                "native_over_auto": round(best["native"] / best["auto"], 2),
                "compile_native_over_auto": round(
                    built["native"][part][2] / built["auto"][part][2], 2
                ),
            }
        )
    return rows


def main() -> None:
    """Measure every case and write the ratios, after each one anew."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", help="default: benchmarks/results/conv_forms[_networks].json")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="every fourth case only")
    parser.add_argument("--networks", action="store_true", help="whole networks, not layers")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of the cases, from 0")
    args = parser.parse_args()
    cases: list[Any] = NETWORKS if args.networks else [*CASES, *SHUFFLES]
    suffix = "_networks" if args.networks else ""
    out = pathlib.Path(args.out or f"benchmarks/results/conv_forms{suffix}.json")
    what = "one whole network" if args.networks else "one convolution or channel shuffle"
    # rows by case: those that are measured again are replaced
    known: dict[int, list[dict[str, Any]]] = {}
    if args.only and out.exists():
        for row in json.loads(out.read_text())["rows"]:
            known.setdefault(row["case"], []).append(row)
    chosen = args.only or range(0, len(cases), 4 if args.quick else 1)
    for number in chosen:
        case = cases[number]
        if args.networks:
            new = measure_network(case, args.rounds)
        else:
            new = (measure_shuffle if len(case) == 4 else measure)(case, args.rounds)
        known[number] = [{"case": number, **row} for row in new]
        print(*map(json.dumps, known[number]), sep="\n", flush=True)
        record = {
            "what": f"native time / form time, best of interleaved rounds, {what} in float32",
            **machine(),
            "rounds": args.rounds,
            "reduced": len(known) < len(cases),
            "rows": [row for key in sorted(known) for row in known[key]],
        }
        write(out, record)


if __name__ == "__main__":
    main()
