"""When does sparse execution pay? CSR and CSC products beside dense ones, density by density.

    python benchmarks/sparse_crossover.py [--size 2000] [--batches 1 64] [--rounds 30] [--out FILE]

Times ``matrix @ vector`` and ``matrix @ (n, batch)`` with `cnnjax.coding.sparse.matmul`, jitted, on
the default device, and SciPy's CSR as a second sparse implementation. Each round times all forms in
turn; the fastest round counts. Only ratios are written (dense over sparse time: above 1, sparse is
faster), with the storage ratio next to them, and the crossover density found by interpolation.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import sys
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse

from cnnjax import files, report
from cnnjax.coding import sparse

RESULTS = pathlib.Path(__file__).parent / "results" / "sparse_crossover.json"
DENSITIES = (0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01)


def crossover(densities: list[float], ratios: list[float]) -> float | None:
    """The density where the ratio passes 1 (log-log interpolation); None if it never does."""
    pairs = sorted(zip(densities, ratios))
    for (d0, r0), (d1, r1) in zip(pairs, pairs[1:], strict=False):
        if r0 >= 1 > r1:
            part = math.log(r0) / math.log(r0 / r1)
            return math.exp(math.log(d0) + part * math.log(d1 / d0))
    return None if ratios and max(ratios) < 1 else max(densities)


def measure(size: int, batch: int, density: float, rounds: int) -> dict[str, Any]:
    """Ratios at one density."""
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((size, size), dtype=np.float32)
    matrix *= rng.random((size, size)) < density
    x = rng.standard_normal((size,) if batch == 1 else (size, batch), dtype=np.float32)
    device = jax.device_put(matrix)
    stored = {
        "csr": jax.device_put(sparse.encode(sparse.drop_negative_zeros(matrix))),
        "csc": jax.device_put(sparse.encode(sparse.drop_negative_zeros(matrix), order="column")),
    }
    product = jax.jit(sparse.matmul)
    dense = jax.jit(jnp.matmul)
    peer = scipy.sparse.csr_array(matrix)
    put = jax.device_put(x)
    forms = {
        "dense": lambda: dense(device, put).block_until_ready(),
        "csr": lambda: product(stored["csr"], put).block_until_ready(),
        "csc": lambda: product(stored["csc"], put).block_until_ready(),
        "scipy_csr": lambda: peer @ x,
    }
    expected = matrix @ x
    for form in forms.values():
        np.testing.assert_allclose(form(), expected, atol=1e-2 * np.abs(expected).max())
    seconds = dict.fromkeys(forms, math.inf)
    for _ in range(rounds):
        for name, form in forms.items():
            began = time.perf_counter()
            form()
            seconds[name] = min(seconds[name], time.perf_counter() - began)
    nse = stored["csr"].nse
    return {
        "density": density,
        "dense_over_sparse_time": {
            name: seconds["dense"] / s for name, s in seconds.items() if name != "dense"
        },
        "dense_over_csr_bytes": matrix.nbytes / sparse.nbytes(matrix.shape, nse),
    }


def main() -> None:
    """Runs all densities and writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=2000)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args()
    out: dict[str, Any] = {"environment": report.environment(), "size": args.size, "batches": {}}
    for batch in args.batches:
        rows = [measure(args.size, batch, d, args.rounds) for d in DENSITIES]
        names = list(rows[0]["dense_over_sparse_time"])
        found = {
            n: crossover(list(DENSITIES), [r["dense_over_sparse_time"][n] for r in rows])
            for n in names
        }
        out["batches"][str(batch)] = {"rows": rows, "sparse_pays_below_density": found}
        for row in rows:
            print(batch, json.dumps(row), flush=True)
        print(batch, "sparse pays below", json.dumps(found), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(args.out, json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
