"""K-means at network scale beside scikit-learn, and coding speed beside zlib and zstd.

    python benchmarks/coding_speed.py [kmeans] [codecs] [--fraction 1.0] [--bits 5] [--out FILE]

``kmeans`` clusters arrays of the shapes of VGG-16 (138 million weights; ``--fraction`` takes that
part of every layer, and the result says so), both from the same linear start and both to
convergence (``--peer_tolerance 1e-4 --peer_iterations 300`` are scikit-learn's defaults: it then
stops earlier, at a larger inertia). The inertia of both is computed in float64.

``codecs`` codes one pruned and shared layer (4 % of 2^22 weights by default) as a compressed file,
and as plain symbol streams.

Times are the fastest of ``--rounds``; wall and processor time, since the machine may be shared.
Speeds are megabytes (10^6) of one-byte codes per second. Ratios above 1: ours is faster.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time
import zlib
from collections.abc import Callable
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np

from cnnjax import coding, files, report
from cnnjax.coding import ans, kmeans, streams
from cnnjax.coding.wire import Reader

RESULTS = pathlib.Path(__file__).parent / "results" / "coding_speed.json"
_WIDTHS = [(3, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 256)]
_WIDTHS += [(256, 512), *[(512, 512)] * 5]
VGG16 = [9 * c * o for c, o in _WIDTHS] + [25088 * 4096, 4096 * 4096, 4096 * 1000]


def timed(fn: Callable[[], Any]) -> tuple[float, float, Any]:
    """Wall seconds, processor seconds, result."""
    wall, cpu = time.perf_counter(), time.process_time()
    out = fn()
    return time.perf_counter() - wall, time.process_time() - cpu, out


def best(fn: Callable[[], Any], rounds: int) -> tuple[float, float, Any]:
    """The fastest of several rounds (each time separately)."""
    runs = [timed(fn) for _ in range(rounds)]
    return min(r[0] for r in runs), min(r[1] for r in runs), runs[-1][2]


def layers(fraction: float) -> list[np.ndarray]:
    """Weights like a trained network's: heavier tails than normal, scale by fan-in."""
    rng = np.random.default_rng(0)
    out = []
    for size in VGG16:
        n = max(1000, int(size * fraction))
        scale = rng.gamma(4.0, 0.25, n).astype(np.float32)
        out.append(rng.standard_normal(n, dtype=np.float32) * scale * np.float32(0.02))
    return out


def bench_kmeans(args: argparse.Namespace) -> dict[str, Any]:
    """Total times over all layers, and the inertia."""
    from sklearn.cluster import KMeans

    k = 2**args.bits
    arrays = layers(args.fraction)
    kmeans.fit(arrays[0], k)  # warm up threads; compilation of the other sizes is counted
    cold = timed(lambda: [kmeans.fit(a, k) for a in arrays])
    warm = best(lambda: [kmeans.fit(a, k) for a in arrays], args.rounds)
    coded = best(lambda: [kmeans.assign(a, c) for a, c in zip(arrays, warm[2])], args.rounds)

    def peer(values: np.ndarray) -> np.ndarray:
        start = np.linspace(values.min(), values.max(), k, dtype=np.float32)[:, None]
        model = KMeans(
            k, init=start, n_init=1, max_iter=args.peer_iterations, tol=args.peer_tolerance
        )
        return model.fit(values[:, None]).cluster_centers_[:, 0]

    theirs = timed(lambda: [peer(a) for a in arrays])
    ours_inertia = [kmeans.inertia(a, c) for a, c in zip(arrays, warm[2])]
    peer_inertia = [kmeans.inertia(a, c) for a, c in zip(arrays, theirs[2])]
    ours_wall, ours_cpu = warm[0] + coded[0], warm[1] + coded[1]
    whole = None
    if args.fraction != 1.0:
        whole = timed(lambda: [kmeans.assign(a, kmeans.fit(a, k)) for a in layers(1.0)])[0]
    return {
        "weights": sum(len(a) for a in arrays),
        "clusters": k,
        "full": args.fraction == 1.0,
        "peer": "sklearn.cluster.KMeans, same linear start, n_init=1",
        "peer_iterations": args.peer_iterations,
        "peer_tolerance": args.peer_tolerance,
        "seconds": {
            "ours_with_codes": ours_wall,
            "ours_cold": cold[0],
            "peer": theirs[0],
            "ours_all_weights_drawn_clustered_coded_cold": whole,
        },
        "speed_ratio_wall": theirs[0] / ours_wall,
        "speed_ratio_processor": theirs[1] / ours_cpu,
        "speed_ratio_wall_cold": theirs[0] / (cold[0] + coded[0]),
        "inertia_ours_over_peer": sum(ours_inertia) / sum(peer_inertia),
        "worst_layer_inertia_ours_over_peer": max(
            a / b for a, b in zip(ours_inertia, peer_inertia)
        ),
    }


def _row(name: str, size: int, data: bytes, encode: Any, decode: Any) -> dict[str, Any]:
    return {
        "coder": name,
        "bytes": len(data),
        "encode_mb_s": size / encode[0] / 1e6,
        "decode_mb_s": size / decode[0] / 1e6,
        "encode_mb_s_processor": size / encode[1] / 1e6,
        "decode_mb_s_processor": size / decode[1] / 1e6,
    }


def peers(codes: np.ndarray, rounds: int) -> list[dict[str, Any]]:
    """zlib, and zstd and constriction where installed, on one-byte codes."""
    raw = codes.astype(np.uint8).tobytes()
    coders: list[tuple[str, Any, Any]] = [
        (f"zlib -{level}", lambda level=level: zlib.compress(raw, level), zlib.decompress)
        for level in (6, 9)
    ]
    try:
        import zstandard

        for level in (3, 19):
            pack = zstandard.ZstdCompressor(level=level).compress
            unpack = zstandard.ZstdDecompressor().decompress
            coders.append((f"zstd -{level}", lambda pack=pack: pack(raw), unpack))
    except ImportError:
        print("zstandard is not installed: left out", file=sys.stderr)
    rows = []
    for name, pack, unpack in coders:
        encoded = best(pack, rounds)
        decoded = best(lambda f=unpack, d=encoded[2]: f(d), rounds)
        assert decoded[2] == raw
        rows.append(_row(name, len(raw), encoded[2], encoded, decoded))
    try:
        import constriction
    except ImportError:
        print("constriction is not installed: left out", file=sys.stderr)
        return rows
    symbols = codes.astype(np.int32)
    freqs = np.bincount(symbols)
    freqs = (freqs / freqs.sum()).astype(np.float32)
    model = constriction.stream.model.Categorical(freqs, perfect=False)

    def encode() -> np.ndarray:
        coder = constriction.stream.stack.AnsCoder()
        coder.encode_reverse(symbols, model)
        return coder.get_compressed()

    encoded = best(encode, rounds)
    decoded = best(
        lambda: constriction.stream.stack.AnsCoder(encoded[2]).decode(model, len(symbols)), rounds
    )
    assert np.array_equal(decoded[2], symbols)
    rows.append(_row("constriction ANS", len(raw), encoded[2].tobytes(), encoded, decoded))
    return rows


def bench_codecs(args: argparse.Namespace) -> dict[str, Any]:
    """One sparse layer of codes as a file, and a stream of codes without zeros."""
    rng = np.random.default_rng(1)
    side = int(np.sqrt(args.codes))
    values = rng.standard_normal((side, side), dtype=np.float32)
    layer = np.where(rng.random((side, side)) < args.density, values, 0)
    coded = {"fc": {"kernel": coding.share_tensor(layer, args.bits)}}
    codes = np.asarray(coded["fc"]["kernel"].codes).reshape(-1)
    tables: dict[str, Any] = {}
    rows = peers(codes, args.rounds)
    for method in ("huffman", "ans", "auto"):
        encoded = best(lambda m=method: coding.pack(coded, method=m), args.rounds)
        decoded = best(lambda d=encoded[2]: coding.unpack(d), args.rounds)
        rows.append(_row(f"ours {method}", len(codes), encoded[2], encoded, decoded))
    tables["pruned_layer"] = rows
    k = 2**args.bits
    freqs = np.bincount(codes[codes > 0] - 1, minlength=k)
    dense = rng.choice(k, args.codes // 4, p=freqs / freqs.sum()).astype(np.uint8)
    rows = peers(dense, args.rounds)
    for method in ("huffman", "ans"):
        encoded = best(lambda m=method: streams.encode(dense, k, method=m), args.rounds)
        decoded = best(
            lambda d=encoded[2]: streams.decode(Reader(d), k, limit=len(dense)), args.rounds
        )
        assert np.array_equal(decoded[2][0], dense)
        rows.append(_row(f"ours {method}", len(dense), encoded[2], encoded, decoded))
    tables["dense_codes"] = rows
    freqs = np.bincount(dense, minlength=k)
    entropy = streams.entropy_bits(freqs) / 8
    return {
        "elements": {"pruned_layer": len(codes), "dense_codes": len(dense)},
        "density": args.density,
        "bits": args.bits,
        "entropy_bytes_of_dense_codes": entropy,
        "ans_precision_cost": ans.cost_bits(freqs, ans.quantize_freqs(freqs, 14)) / 8 / entropy,
        "tables": tables,
    }


def main() -> None:
    """Runs what was asked for and merges it into the result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="*", default=["kmeans", "codecs"])
    parser.add_argument("--fraction", type=float, default=1.0)
    parser.add_argument("--bits", type=int, default=5)
    parser.add_argument("--codes", type=int, default=1 << 22)
    parser.add_argument("--density", type=float, default=0.04)
    parser.add_argument("--peer_iterations", type=int, default=3000)
    parser.add_argument("--peer_tolerance", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args()
    benches = {"kmeans": bench_kmeans, "codecs": bench_codecs}
    if unknown := set(args.what) - set(benches):
        parser.error(f"unknown benchmark {sorted(unknown)}; choose from {sorted(benches)}")
    found = json.loads(args.out.read_text()) if args.out.exists() else {}
    for what in args.what:
        found[what] = {"environment": report.environment(), **benches[what](args)}
        print(json.dumps(found[what], indent=1))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(args.out, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
