"""Packs parameters into a compressed file, unpacks it, or says what is in it.

    python scripts/compress_file.py pack weights.npz small.cnnz --bits 5
    python scripts/compress_file.py pack weights.npz small.cnnz --bits "conv*/**=8" "**=5" \
        --centroids float16 --others float16
    python scripts/compress_file.py pack saved_model small.cnnz --uniform 8
    python scripts/compress_file.py unpack small.cnnz weights.npz
    python scripts/compress_file.py unpack small.cnnz new_model --into saved_model
    python scripts/compress_file.py info small.cnnz

IN of ``pack`` is an .npz file of arrays named by path ("blocks/0/conv1/kernel"), or a directory
written by ``cnnjax.save``; zeros in it are pruned weights and cost next to nothing. Without
``--bits`` or ``--uniform`` the file is lossless. ``unpack`` writes such an .npz, or with ``--into``
a copy of a saved model with the file's parameters.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    main = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = main.add_subparsers(dest="action", required=True)
    pack = actions.add_parser("pack", help="arrays or a saved model -> compressed file")
    pack.add_argument("source", type=pathlib.Path, help=".npz or directory of cnnjax.save")
    pack.add_argument("target", type=pathlib.Path)
    kind = pack.add_mutually_exclusive_group()
    kind.add_argument("--bits", nargs="+", metavar="B|GLOB=B", help="shared weights: codebook bits")
    kind.add_argument("--uniform", nargs="+", metavar="B|GLOB=B", help="uniform codes: bits")
    pack.add_argument("--include", nargs="+", default=["**/kernel"], help="globs of what is coded")
    pack.add_argument("--exclude", nargs="+", default=[], help="globs of what is not")
    pack.add_argument("--init", default="linear", help="k-means start: linear or density")
    pack.add_argument("--centroids", metavar="DTYPE", help="round codebooks, e.g. to float16")
    pack.add_argument("--others", metavar="DTYPE", help="round the other arrays, e.g. to float16")
    pack.add_argument("--method", default="auto", help="auto, fixed, huffman or ans")
    pack.add_argument("--metadata", type=json.loads, default={}, help="JSON object to store")
    unpack = actions.add_parser("unpack", help="compressed file -> arrays or a saved model")
    unpack.add_argument("source", type=pathlib.Path)
    unpack.add_argument("target", type=pathlib.Path)
    unpack.add_argument("--into", type=pathlib.Path, help="saved model that gets the parameters")
    info = actions.add_parser("info", help="sizes per tensor and stage")
    info.add_argument("source", type=pathlib.Path)
    info.add_argument("--json", action="store_true", help="machine-readable")
    for action in (unpack, info):
        action.add_argument("--max_bytes", type=int, help="refuse files that expand beyond this")
    return main


def per_glob(items: Sequence[str]) -> int | dict[str, int]:
    """``["5"] -> 5``, ``["a=3", "**=5"] -> {"a": 3, "**": 5}``."""
    if len(items) == 1 and "=" not in items[0]:
        return int(items[0])
    out = {}
    for item in items:
        glob, sign, value = item.rpartition("=")
        if not sign:
            raise ValueError(f"expected GLOB=BITS, got {item!r}")
        out[glob] = int(value)
    return out


def read_source(path: pathlib.Path) -> Any:
    """Parameters (nested dict) of an .npz file or a saved model."""
    import numpy as np
    from flax import nnx

    import cnnjax
    from cnnjax.coding.coded import nest_like

    if path.is_dir():
        return nnx.to_pure_dict(nnx.state(cnnjax.load(path), nnx.Param))
    with np.load(path, allow_pickle=False) as file:
        return nest_like({name: file[name] for name in file.files})


def pack(args: argparse.Namespace) -> str:
    """Runs ``pack`` and returns what to print."""
    from cnnjax import coding
    from cnnjax import tree as treelib

    params = read_source(args.source)
    chosen = {"include": args.include, "exclude": args.exclude}
    coded = params
    if args.bits:
        coded = coding.share(params, per_glob(args.bits), init=args.init, **chosen)
    elif args.uniform:
        coded = coding.quantize_tree(params, per_glob(args.uniform), **chosen)
    options = coding.DeepCompression(centroid_dtype=args.centroids, other_dtype=args.others)
    coded = coding.round_tables(coded, options)
    data = coding.pack(coded, metadata=args.metadata, method=args.method)
    coding.save(args.target, data)
    dense = 4 * treelib.count(params)
    return f"{args.target}: {len(data):,} bytes, {dense / len(data):.2f} times below float32"


def unpack(args: argparse.Namespace) -> str:
    """Runs ``unpack`` and returns what to print."""
    import numpy as np
    from flax import nnx

    import cnnjax
    from cnnjax import coding, files
    from cnnjax import tree as treelib

    limit = args.max_bytes or coding.MAX_BYTES
    params = coding.expand(coding.load(args.source, max_bytes=limit).coded)
    flat = treelib.flatten(params)
    if args.into is None:
        named: dict[str, Any] = {name: np.asarray(leaf) for name, leaf in flat.items()}
        with files.replacing(args.target) as temporary, open(temporary, "wb") as file:
            np.savez(file, **named)
    else:
        model = cnnjax.load(args.into)
        state = nnx.state(model, nnx.Param)
        treelib.check_same_structure(state, params, what=str(args.source))
        nnx.update(model, treelib.map_with_path(lambda path, _: flat[path], state))
        cnnjax.save(args.target, model)
    return f"{args.target}: {len(flat)} tensors, {treelib.count(params):,} numbers"


def info(args: argparse.Namespace) -> str:
    """Runs ``info`` and returns what to print."""
    from cnnjax import coding

    limit = args.max_bytes or coding.MAX_BYTES
    contents = coding.load(args.source, max_bytes=limit)
    report = coding.report(args.source.read_bytes(), max_bytes=limit)
    if args.json:
        return json.dumps({"metadata": contents.metadata, **report.as_dict()}, indent=1)
    facts = json.dumps(contents.metadata) if contents.metadata else "none"
    return f"{report}\nmetadata: {facts}"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 with one line of explanation."""
    args = parser().parse_args(argv)
    try:
        print({"pack": pack, "unpack": unpack, "info": info}[args.action](args))
    except (ValueError, TypeError, KeyError, OSError) as error:
        print(f"compress_file.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
