"""Same-shaped layers one by one and side by side: the case 'together' of the comparison.

python benchmarks/factorization_vs_tensorly.py --cases together --weights FILE.npz
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.factorization_vs_tensorly import error, in_turns, of_cp
from cnnjax import factorization as f


def together_case(kernels: list[np.ndarray], rank: int, sweeps: int, runs: int) -> dict[str, Any]:
    """Same-shaped layers: ours one by one and side by side, TensorLy's numpy one by one."""
    import tensorly as tl
    from tensorly.decomposition import parafac, partial_tucker

    rng = np.random.default_rng(1)
    start = [rng.standard_normal((n, rank)).astype(np.float32) for n in kernels[0].shape]
    begun, key, count = [jnp.asarray(x) for x in start], jax.random.key(0), len(kernels)
    tensors = [jnp.asarray(k) for k in kernels]
    stacked, keys = jnp.stack(tensors), jax.random.split(key, count)
    starts = [jnp.stack([x] * count) for x in begun]
    half = tuple(max(1, n // 2) for n in kernels[0].shape[2:])
    basis = max(1, kernels[0].shape[3] // 2)
    many_tucker = jax.jit(jax.vmap(lambda k: f.tucker2(k, *half, sweeps=10)))
    many_basis = jax.jit(jax.vmap(lambda k: f.filter_basis(k, basis)))
    options: dict[str, Any] = {"sweeps": sweeps, "tolerance": -1.0}
    ways = {
        "cp": (
            lambda: [f.cp_als(key, t, rank, start=begun, **options)[0] for t in tensors],
            lambda: f.cp_als_together(keys, stacked, rank, starts=starts, **options)[0],
        ),
        "tucker2": (
            lambda: [f.tucker2(t, *half, sweeps=10) for t in tensors],
            lambda: many_tucker(stacked),
        ),
        "svd": (
            lambda: [f.filter_basis(t, basis) for t in tensors],
            lambda: many_basis(stacked),
        ),
    }
    tl.set_backend("numpy")

    def init() -> Any:
        return (None, [x.copy() for x in start])

    peers = {
        "cp": lambda: [
            parafac(k, rank, n_iter_max=sweeps, init=init(), tol=0).factors for k in kernels
        ],
        "tucker2": lambda: [
            partial_tucker(k, rank=list(half), modes=[2, 3], n_iter_max=10, tol=0) for k in kernels
        ],
    }
    out: dict[str, Any] = {"layers": count, "shape": list(kernels[0].shape), "rank": rank}
    for method, (alone, together) in ways.items():
        alone(), together()  # compile
        (one, _), (all_, ours) = in_turns(alone, together, runs)
        row = {"alone": one, "together": all_, "together_pays": one / all_}
        if method in peers:
            (row["numpy"], found), _ = in_turns(peers[method], lambda: None, 2)
            row["ratio"] = row["numpy"] / min(row["alone"], row["together"])
            if method == "cp":
                fits = [[np.asarray(x[i]) for x in ours] for i in range(count)]
                row["error"] = float(np.mean([error(k, of_cp(x)) for k, x in zip(kernels, fits)]))
                row["numpy_error"] = float(
                    np.mean([error(k, of_cp(x)) for k, x in zip(kernels, found)])
                )
        out[method] = row
    return out


def measure_together(flags: argparse.Namespace) -> dict[str, Any]:
    """Every 3x3 convolution of the trained network, shape by shape."""
    if flags.weights is None:
        raise ValueError("case 'together' needs --weights FILE.npz")
    groups: dict[tuple[int, ...], list[np.ndarray]] = {}
    with np.load(flags.weights) as file:
        for name in file.files:
            if file[name].ndim == 4 and file[name].shape[2] == 3 and file[name].shape[1] > 3:
                kernel = np.ascontiguousarray(file[name].transpose(2, 3, 1, 0))
                groups.setdefault(kernel.shape, []).append(kernel)
    rows = []
    for shape, kernels in groups.items():
        rank = flags.rank or max(8, min(shape[2:]) // 4)
        rows.append(together_case(kernels, rank, flags.sweeps, flags.runs))
        print(json.dumps(rows[-1]), flush=True)
    total = {}
    for method in ("cp", "tucker2"):
        ours = sum(min(r[method]["alone"], r[method]["together"]) for r in rows)
        total[method] = {"seconds": ours, "ratio": sum(r[method]["numpy"] for r in rows) / ours}
    print(json.dumps(total), flush=True)
    return {"layers": rows, "total": total}
