"""CP and Tucker-2 beside TensorLy: equal starts, equal sweeps, equal fit; time of each.

    python benchmarks/factorization_vs_tensorly.py [--out FILE] [--cases big cifar resnet50 vgg16]

Cases:
  big       one 256x256x3x3 kernel, CP rank 64 and Tucker-2 at half of both channel modes;
  cifar     the 3x3 kernels of a trained CIFAR-10 ResNet (``--weights FILE.npz``, names and layouts
            of PyTorch);
  together  all 3x3 kernels of that network, same-shaped layers one by one and side by side (SVD,
            Tucker-2, CP), beside TensorLy's numpy backend;
  resnet50, vgg16   every convolution of the network, random with power-law spectra (each shape is
            timed once and counted as often as it occurs). Tucker-2 at half of both channel modes;
            the first layer, as in Kim et al., at half of its outputs alone.

CP: alternating least squares for a fixed number of sweeps from the same random factors (ours of a
1x1 kernel, which is a matrix, is its SVD); TensorLy's ``parafac`` without tolerance. Tucker-2:
higher-order orthogonal iteration from the truncated HOSVD (both make it themselves; ours of a 1x1
kernel iterates no further), TensorLy's ``partial_tucker``. Peer backends: numpy and jax. Times are
CPU seconds of the process, all threads together, the least of several runs that alternate between
the two sides (once for a peer that takes more than five seconds): pin the process to one core, and
what else the machine does hardly counts. Ours are without compilation, which is shown apart. The
relative errors of both sides are computed by NumPy in double precision from the factors. A row is
written as soon as it is measured; ``--resume`` keeps the rows that the file has.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from cnnjax import factorization as f
from cnnjax import files

# (kh, kw, i, o): how many layers have it
RESNET50 = {
    (7, 7, 3, 64): 1,
    (1, 1, 64, 64): 1,
    (3, 3, 64, 64): 3,
    (1, 1, 64, 256): 4,
    (1, 1, 256, 64): 2,
    (1, 1, 256, 128): 1,
    (3, 3, 128, 128): 4,
    (1, 1, 128, 512): 4,
    (1, 1, 256, 512): 1,
    (1, 1, 512, 128): 3,
    (1, 1, 512, 256): 1,
    (3, 3, 256, 256): 6,
    (1, 1, 256, 1024): 6,
    (1, 1, 512, 1024): 1,
    (1, 1, 1024, 256): 5,
    (1, 1, 1024, 512): 1,
    (3, 3, 512, 512): 3,
    (1, 1, 512, 2048): 3,
    (1, 1, 1024, 2048): 1,
    (1, 1, 2048, 512): 2,
}
VGG16 = {
    (3, 3, 3, 64): 1,
    (3, 3, 64, 64): 1,
    (3, 3, 64, 128): 1,
    (3, 3, 128, 128): 1,
    (3, 3, 128, 256): 1,
    (3, 3, 256, 256): 2,
    (3, 3, 256, 512): 1,
    (3, 3, 512, 512): 5,
}


def power_law(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """A kernel whose channel unfoldings have singular values falling like 1 / n."""
    rng = np.random.default_rng(seed)
    kernel = rng.standard_normal(shape)
    for axis in (2, 3):
        n = shape[axis]
        q, _ = np.linalg.qr(rng.standard_normal((n, n)))
        mixing = (q * np.arange(1, n + 1) ** -1.0) @ q.T
        kernel = np.moveaxis(np.tensordot(kernel, mixing, axes=([axis], [0])), -1, axis)
    return (kernel / np.linalg.norm(kernel)).astype(np.float32)


def once(run: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of one run, and its result."""
    start = time.process_time()
    out = jax.block_until_ready(run())
    return time.process_time() - start, out


def in_turns(ours: Callable[[], Any], peer: Callable[[], Any], runs: int) -> list[tuple]:
    """(Fewest CPU seconds, last result) of both sides, called in turns."""
    best, out = [np.inf, np.inf], [None, None]
    for _ in range(runs):
        for side, run in enumerate((ours, peer)):
            # as long on either side: what takes microseconds is called more often
            for _ in range(int(np.clip(0.15 / best[side], 1, 300))):
                seconds, out[side] = once(run)
                best[side] = min(best[side], seconds)
                if side and seconds > 5:
                    return list(zip(best, out))
    return list(zip(best, out))


def error(kernel: np.ndarray, again: np.ndarray) -> float:
    """Relative Frobenius error in double precision."""
    k = kernel.astype(np.float64)
    return float(np.linalg.norm(k - again) / np.linalg.norm(k))


def of_cp(factors: Any) -> np.ndarray:
    """The tensor of CP factors."""
    a, b, c, d = (np.asarray(x, np.float64) for x in factors)
    spatial = np.einsum("ar,br->abr", a, b).reshape(len(a) * len(b), -1)
    channels = np.einsum("ir,or->rio", c, d).reshape(a.shape[1], -1)
    return (spatial @ channels).reshape(len(a), len(b), len(c), len(d))


def of_tucker(core: Any, first: Any, last: Any) -> np.ndarray:
    """The kernel of Tucker-2 factors."""
    core, first, last = (np.asarray(x, np.float64) for x in (core, first, last))
    return np.einsum("abpq,ip,oq->abio", core, first, last, optimize=True)


def cp_case(
    kernel: np.ndarray, rank: int, sweeps: int, runs: int, backends: list[str], row: dict
) -> dict:
    """Ours and TensorLy's CP from the same factors; adds the backends that the row lacks."""
    from tensorly.decomposition import parafac

    rng = np.random.default_rng(1)
    start = [rng.standard_normal((n, rank)).astype(np.float32) for n in kernel.shape]
    ours_start = [jnp.asarray(x) for x in start]
    tensor, key = jnp.asarray(kernel), jax.random.key(0)

    def run() -> Any:
        return f.cp_als(key, tensor, rank, sweeps=sweeps, tolerance=-1.0, start=ours_start)[0]

    def peer(tl: Any) -> Any:
        init = (None, [tl.tensor(x.copy()) for x in start])
        return parafac(tl.tensor(kernel), rank, n_iter_max=sweeps, init=init, tol=0).factors

    row = {"rank": rank, "sweeps": sweeps} | row
    return beside(row, backends, run, peer, runs, lambda x: error(kernel, of_cp(x)))


def tucker_case(
    kernel: np.ndarray,
    ranks: tuple[int, int],
    sweeps: int,
    runs: int,
    backends: list[str],
    row: dict,
) -> dict:
    """Ours and TensorLy's Tucker-2; adds the backends that the row lacks."""
    from tensorly.decomposition import partial_tucker

    tensor = jnp.asarray(kernel)

    def run() -> Any:
        t = f.tucker2(tensor, *ranks, sweeps=sweeps)
        return t.core, t.first, t.last

    def peer(tl: Any) -> Any:
        core, factors = partial_tucker(
            tl.tensor(kernel), rank=list(ranks), modes=[2, 3], n_iter_max=sweeps, tol=0
        )[0]
        return core, *factors

    row = {"ranks": list(ranks), "sweeps": sweeps} | row
    return beside(row, backends, run, peer, runs, lambda x: error(kernel, of_tucker(*x)))


def beside(
    row: dict[str, Any],
    backends: list[str],
    run: Callable[[], Any],
    peer: Callable[[Any], Any],
    runs: int,
    judge: Callable[[Any], float],
) -> dict[str, Any]:
    """Times ours in turns with each backend that the row lacks."""
    import tensorly as tl

    first = None
    if "compile_seconds" not in row:
        first = once(run)[0]
    for backend in [b for b in backends if b not in row]:
        tl.set_backend(backend)
        (seconds, ours), (times, found) = in_turns(run, lambda: peer(tl), runs)
        row["seconds"] = min(seconds, row.get("seconds", np.inf))
        row["error"] = judge(ours)
        row[backend] = {"seconds": times, "error": judge(found)}
    if first is not None:
        row["compile_seconds"] = max(0.0, first - row["seconds"])
    for backend in set(row) & {"numpy", "jax"}:
        row[backend]["ratio"] = row[backend]["seconds"] / row["seconds"]
    return row


def kernels_of(case: str, weights: str | None) -> list[tuple[str, np.ndarray, int]]:
    """(name, kernel, count) of a case."""
    if case == "big":
        return [("3x3x256x256", power_law((3, 3, 256, 256)), 1)]
    if case in ("resnet50", "vgg16"):
        shapes = RESNET50 if case == "resnet50" else VGG16
        return [("x".join(map(str, s)), power_law(s), n) for s, n in shapes.items()]
    if weights is None:
        raise ValueError("case 'cifar' needs --weights FILE.npz")
    with np.load(weights) as file:
        found = {k: file[k] for k in file.files if file[k].ndim == 4 and file[k].shape[2] == 3}
    names = list(found)
    picked = [names[len(names) // 3], names[-1]]
    return [(n, np.ascontiguousarray(found[n].transpose(2, 3, 1, 0)), 1) for n in picked]


def measure(
    case: str,
    flags: argparse.Namespace,
    known: dict[str, dict],
    write: Callable[[Any], None],
) -> dict[str, Any]:
    """All kernels of a case, and their sums; ``known``: rows by kernel, of this case or others."""
    rows = []
    for name, kernel, count in kernels_of(case, flags.weights):
        _, _, i, o = kernel.shape
        rank = flags.rank or max(8, min(i, o) // 4)
        row = {"kernel": name, "count": count}
        old = known.get(name, {})
        half = (i if i == 3 else max(1, i // 2), max(1, o // 2))
        common = (flags.runs, flags.backends)
        row["cp"] = cp_case(kernel, rank, flags.sweeps, *common, old.get("cp", {}))
        row["tucker2"] = tucker_case(
            kernel, half, flags.tucker_sweeps, *common, old.get("tucker2", {})
        )
        rows.append(row)
        write({"layers": rows})
        for method in ("cp", "tucker2"):
            r = row[method]
            peers = ", ".join(
                f"{b} {r[b]['ratio']:.1f}x (error {r[b]['error']:.6f})" for b in flags.backends
            )
            print(
                f"{case} {name} {method}: {1e3 * r['seconds']:.1f} ms (compiled in "
                f"{r['compile_seconds']:.2f} s), error {r['error']:.6f}; TensorLy {peers}",
                flush=True,
            )
    totals = {}
    for method in ("cp", "tucker2"):
        ours = sum(r[method]["seconds"] * r["count"] for r in rows)
        totals[method] = {
            "seconds": ours,
            "compile_seconds": sum(r[method]["compile_seconds"] for r in rows),
            "ratio": {
                b: sum(r[method][b]["seconds"] * r["count"] for r in rows) / ours
                for b in flags.backends
            },
            "largest_error_above_peer": max(
                r[method]["error"] - r[method][b]["error"] for r in rows for b in flags.backends
            ),
        }
    return {"layers": rows, "total": totals}


def main() -> int:
    """Runs the cases and writes the figures after each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="benchmarks/results/factorization_vs_tensorly.json")
    parser.add_argument("--cases", nargs="+", default=["big", "resnet50", "vgg16"])
    parser.add_argument("--weights", help="trained CIFAR-10 ResNet for the case 'cifar'")
    parser.add_argument("--backends", nargs="+", default=["numpy", "jax"])
    parser.add_argument("--rank", type=int, default=0, help="of CP; default: channels / 4")
    parser.add_argument("--sweeps", type=int, default=25)
    parser.add_argument("--tucker_sweeps", type=int, default=10)
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--resume", action="store_true", help="keep the rows that the file has")
    flags = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)  # compile time is a figure here
    out = pathlib.Path(flags.out)
    known: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"cases": {}}
    known.update(
        hardware=f"{platform.machine()} {jax.default_backend()}, {os.cpu_count()} cores",
        jax=jax.__version__,
        clock="CPU seconds of the process, least of alternating runs; ours without compilation",
    )
    done: dict[str, dict] = {}
    for case in flags.cases:

        def write(rows: dict[str, Any], case: str = case) -> None:
            known["cases"][case] = rows
            files.write_text(out, json.dumps(known, indent=1) + "\n")

        if case == "together":
            from benchmarks.factorization_together import measure_together

            write(measure_together(flags))
            continue
        # the same kernel occurs in several cases: it is measured once
        seen = dict(done)
        if flags.resume:
            for old in known["cases"].values():
                seen |= {r["kernel"]: r for r in old["layers"] if "kernel" in r}
        found = measure(case, flags, seen, write)
        done |= {r["kernel"]: r for r in found["layers"]}
        write(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
