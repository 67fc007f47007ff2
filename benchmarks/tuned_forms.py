"""Measure the forms of whole networks' convolutions here, and what the measured table gains.

    python benchmarks/tuned_forms.py [--networks mobilenet_v2 ...] [--size 96] [--batch 8]
        [--dtype bfloat16] [--table FILE] [--out FILE] [--rounds 20] [--clock cpu]

``cnnjax.ops.tune`` times the forms of every convolution and channel shuffle of each network on
JAX's default device (CPU, GPU, TPU); then the network's evaluation and the gradient of its weights
run in turn by the rules of ``cnnjax/ops/choice.py`` and under the measured table, and the fastest
round of each counts. Only ratios are written (time by the rules / time under the table: above 1,
the table is faster), with every part where the two differ. ``--clock cpu`` counts the process's CPU
seconds, on a CPU that others use as well. ``--table`` keeps the measured forms in
a file (`cnnjax.ops.FormTable.load`); what it holds already is not measured again.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from records import machine, write

from cnnjax import models, ops, training
from cnnjax.ops import choice, table

NETWORKS = ("mobilenet_v2", "shufflenet_v1_g3")


def _programs(model: Any, dtype: str | None) -> dict[str, Any]:
    """Jitted evaluation and gradient, with their parameters."""
    programs = {}
    for part in ("forward", "gradient"):
        mode = training.set_mode(model, train=part == "gradient")
        if dtype is not None:
            training.set_compute_dtype(mode, dtype)
        graphdef, params, rest = nnx.split(mode, nnx.Param, ...)

        def run(params: Any, x: Any, graphdef: Any = graphdef, rest: Any = rest) -> Any:
            return nnx.merge(graphdef, params, rest, copy=True)(x)

        def loss(params: Any, x: Any, run: Any = run) -> Any:
            return jnp.mean(jnp.square(run(params, x).astype(jnp.float32)))

        programs[part] = (run if part == "forward" else jax.grad(loss), params)
    return programs


def _once(call: Any, repeats: int, clock: Any) -> float:
    start, out = clock(), None
    for _ in range(repeats):
        out = call()
    jax.block_until_ready(out)
    return (clock() - start) / repeats


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """The row of one network."""
    model = models.create(name, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).standard_normal((args.batch, args.size, args.size, 3))
    x = jnp.asarray(x, args.dtype or jnp.float32)
    programs = _programs(model, args.dtype)
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[args.clock]
    timer = functools.partial(_once, clock=clock)
    began = time.monotonic()
    found = ops.FormTable(*table.present_device(), {})
    parts: list[table.Key] = []
    for fn, params in programs.values():
        options = {"rounds": args.rounds, "margin": args.margin, "timer": timer}
        measured = ops.tune(fn, params, x, cache=args.table, **options)
        found = ops.FormTable(
            found.platform,
            found.device,
            {**found.forms, **measured.forms},
            {**found.gains, **measured.gains},
        )
        parts += [key for key in ops.chosen_parts(fn, params, x) if key not in parts]
    minutes = (time.monotonic() - began) / 60
    here = found.platform
    changed = []
    for part, case in parts:
        if isinstance(case, ops.ShuffleCase):
            rule = choice.choose_shuffle(case, platform=here)
        else:
            rule = ops.choose(case, part, platform=here)
        form, gains = found.forms.get((part, case), rule), found.gains.get((part, case), {})
        if form != rule:
            gains = {"native": 1.0, **gains}
            ratio = gains[form] / gains[rule] if rule in gains else None
            changed.append(
                {
                    "kind": table.kind_of_case(case),
                    "part": part,
                    "x": case.x,
                    "kernel": None if isinstance(case, ops.ShuffleCase) else case.kernel,
                    "groups": (case if isinstance(case, ops.ShuffleCase) else case.spec).groups,
                    "rule": rule,
                    "table": form,
                    "rule_over_table": ratio and round(ratio, 2),
                }
            )
    over = {}
    for part, (fn, params) in programs.items():
        compiled = {"rule": jax.jit(fn).lower(params, x).compile()}
        with ops.use_table(found):
            compiled["table"] = jax.jit(fn).lower(params, x).compile()
        best = dict.fromkeys(compiled, float("inf"))
        for program in compiled.values():
            jax.block_until_ready(program(params, x))
        for _ in range(args.rounds):
            for form, program in compiled.items():
                call = functools.partial(program, params, x)
                best[form] = min(best[form], timer(call, args.repeats))
        out = [jax.tree.leaves(program(params, x)) for program in compiled.values()]
        apart = [jnp.sum(jnp.square(a - b)) for a, b in zip(*out, strict=True)]
        whole = [jnp.sum(jnp.square(a)) for a in out[0]]
        over[part] = {
            "rule_over_table": round(best["rule"] / best["table"], 3),
            "difference_over_norm": float(jnp.sqrt(sum(apart) / sum(whole))),
        }
    return {
        "network": name,
        "batch": args.batch,
        "size": args.size,
        "dtype": args.dtype or "float32",
        "parts": len(parts),
        "tuning_minutes": round(minutes, 1),
        **over,
        "changed": changed,
    }


def main() -> None:
    """Measure network after network and write the rows, after each one anew."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", help="compute type; default float32")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--margin", type=float, default=0.2, help="see cnnjax.ops.tune")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=1, help="calls in one round of a network")
    parser.add_argument("--table", help="file of measured forms, read and added to")
    parser.add_argument("--out", default="benchmarks/results/tuned_forms.json")
    args = parser.parse_args()
    out = pathlib.Path(args.out)
    rows: dict[str, Any] = {}
    if out.exists():
        rows = {row["network"]: row for row in json.loads(out.read_text())["rows"]}
    for name in args.networks:
        rows[name] = measure(name, args)
        print(json.dumps(rows[name]), flush=True)
        record = {
            "what": "time by the rules / time under the measured table, best of rounds in turns",
            **machine(),
            "rounds": args.rounds,
            "clock": args.clock,
            "margin": args.margin,
            "rows": list(rows.values()),
        }
        write(out, record)


if __name__ == "__main__":
    main()
