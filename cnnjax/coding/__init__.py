"""Coding: sparse storage, shared weights, entropy coding and the compressed file.

The usual way::

    coded = coding.share(params, bits={"fc*/kernel": 5, "**": 8})   # zeros in params stay zeros
    books = coding.codebooks(coded)                                  # train these:
    loss  = lambda books: f(coding.expand(coding.with_codebooks(coded, books)))
    blob  = coding.pack(coded, metadata={"model": "lenet_5_caffe"})
    print(coding.report(blob))
    params = coding.expand(coding.unpack(blob).coded)                # bit for bit

Sparse Winograd convolutions are in `cnnjax.coding.winograd`.
"""

from __future__ import annotations

from cnnjax.coding import (
    ans,
    huffman,
    kmeans,
    multiplications,
    relative_index,
    sparse,
    streams,
    uniform,
    winograd,
)
from cnnjax.coding.coded import (
    Shared,
    centroid_grad,
    codebooks,
    expand,
    is_coded,
    with_codebooks,
)
from cnnjax.coding.container import MAX_BYTES, Contents, Entry, load, pack, save, unpack
from cnnjax.coding.deep_compression import (
    DeepCompression,
    codebook_hooks,
    compress,
    decompress,
    finetune_codebooks,
    round_tables,
)
from cnnjax.coding.network import absorb_statistics, complete, restore, variables
from cnnjax.coding.sharing import (
    fake_quantize_tree,
    quantize_tree,
    round_leaves,
    share,
    share_tensor,
    sharing_rate,
)
from cnnjax.coding.sizes import SizeReport, TensorSize, report
from cnnjax.coding.sparse import drop_negative_zeros
from cnnjax.coding.uniform import Uniform, fake_quantize, quantize
from cnnjax.coding.winograd import WinogradReLU
from cnnjax.coding.wire import FormatError

__all__ = [
    "MAX_BYTES",
    "Contents",
    "DeepCompression",
    "Entry",
    "FormatError",
    "Shared",
    "SizeReport",
    "TensorSize",
    "Uniform",
    "WinogradReLU",
    "absorb_statistics",
    "ans",
    "centroid_grad",
    "codebook_hooks",
    "codebooks",
    "complete",
    "compress",
    "decompress",
    "drop_negative_zeros",
    "expand",
    "fake_quantize",
    "fake_quantize_tree",
    "finetune_codebooks",
    "huffman",
    "is_coded",
    "kmeans",
    "load",
    "multiplications",
    "pack",
    "quantize",
    "quantize_tree",
    "relative_index",
    "report",
    "restore",
    "round_leaves",
    "round_tables",
    "save",
    "share",
    "share_tensor",
    "sharing_rate",
    "sparse",
    "streams",
    "uniform",
    "unpack",
    "variables",
    "winograd",
    "with_codebooks",
]
