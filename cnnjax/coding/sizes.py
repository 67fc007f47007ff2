"""Bytes of a compressed network at every stage, recomputed from what the file holds.

The stages of Han et al. (arXiv 1510.00149): dense float32; the same non-zeros as CSR; shared codes
with relative indices at fixed widths; Huffman-coded; and the actual file.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

from cnnjax.coding import container, sparse

STAGES = ("dense", "csr", "indexed", "huffman", "file")


@dataclasses.dataclass(frozen=True)
class TensorSize:
    """One tensor's bytes.

    Attributes:
      path, shape: which tensor.
      nonzeros: numbers that are not zero.
      codes: size of its codebook or grid (0 where stored raw).
      dense: float32, 4 bytes a number.
      csr: float32 values, 32-bit indices and pointers (dense where CSR would be larger).
      indexed: codebook, fixed-width codes and fixed-width gaps.
      huffman: the same, Huffman-coded, with code tables.
      file: its payload in the actual file.
    """

    path: str
    shape: tuple[int, ...]
    nonzeros: int
    codes: int
    dense: int
    csr: int
    indexed: int
    huffman: int
    file: int


@dataclasses.dataclass(frozen=True)
class SizeReport:
    """Bytes per tensor and stage; ``str()`` is a table, `as_dict` JSON-able.

    ``overhead`` is the file's header, table and digest; it is counted in the totals of the last
    three stages, which are sizes of real files.
    """

    tensors: tuple[TensorSize, ...]
    file_bytes: int
    overheads: dict[str, int]

    def total(self, stage: str) -> int:
        """Bytes of the whole network at a stage (see `STAGES`)."""
        if stage not in STAGES:
            raise ValueError(f"stage must be one of {STAGES}, got {stage!r}")
        return sum(getattr(t, stage) for t in self.tensors) + self.overheads.get(stage, 0)

    @property
    def ratio(self) -> float:
        """Dense float32 bytes over the bytes of the file."""
        return self.total("dense") / self.file_bytes

    @property
    def stage_ratios(self) -> dict[str, float]:
        """What each stage gains over the one before; the product is `ratio`."""
        return {
            later: self.total(earlier) / self.total(later)
            for earlier, later in itertools.pairwise(STAGES)
        }

    def as_dict(self) -> dict[str, Any]:
        """Raw counts and the ratios recomputed from them."""
        return {
            "bytes": {stage: self.total(stage) for stage in STAGES},
            "ratio": self.ratio,
            "stage_ratios": self.stage_ratios,
            "parameters": sum(math.prod(t.shape) for t in self.tensors),
            "nonzeros": sum(t.nonzeros for t in self.tensors),
            "tensors": [dataclasses.asdict(t) for t in self.tensors],
        }

    def __str__(self) -> str:
        name = max([len(t.path) for t in self.tensors] + [6])
        lines = [f"{'tensor':<{name}} {'density':>8} {'codes':>6}"]
        lines[0] += "".join(f" {stage:>11}" for stage in STAGES)
        for t in self.tensors:
            density = t.nonzeros / max(1, math.prod(t.shape))
            lines.append(
                f"{t.path:<{name}} {density:>8.2%} {t.codes or '-':>6}"
                + "".join(f" {getattr(t, stage):>11,}" for stage in STAGES)
            )
        lines.append(
            f"{'total':<{name}} {'':>8} {'':>6}" + "".join(f" {self.total(s):>11,}" for s in STAGES)
        )
        lines.append(
            f"file: {self.file_bytes:,} bytes, {self.ratio:.2f} times smaller than float32"
        )
        return "\n".join(lines)


def report(data: bytes, *, max_bytes: int = container.MAX_BYTES) -> SizeReport:
    """Sizes of a compressed file at every stage.

    Args:
      data: the file's bytes; the fixed-width and Huffman stages are measured by packing its tree
        again with those coders.
      max_bytes: see `cnnjax.coding.unpack`.

    Raises:
      FormatError: if the file is not intact.
    """
    contents = container.unpack(data, max_bytes=max_bytes)
    other: dict[str, dict[str, int]] = {}
    overheads = {"file": len(data) - sum(e.nbytes for e in contents.entries)}
    for stage, method in (("indexed", "fixed"), ("huffman", "huffman")):
        again = container.pack(contents.coded, metadata=contents.metadata, method=method)
        entries = container.unpack(again, max_bytes=max_bytes).entries
        other[stage] = {e.path: e.nbytes for e in entries}
        overheads[stage] = len(again) - sum(other[stage].values())
    rows = []
    for entry in contents.entries:
        dense = 4 * math.prod(entry.shape)
        columns = entry.shape[-1] if entry.shape else 1
        lowered = (math.prod(entry.shape[:-1]), columns)
        csr = sparse.nbytes(lowered, entry.parts.nonzeros)
        rows.append(
            TensorSize(
                path=entry.path,
                shape=entry.shape,
                nonzeros=entry.parts.nonzeros,
                codes=entry.parts.codes,
                dense=dense,
                csr=min(csr, dense),
                indexed=other["indexed"][entry.path],
                huffman=other["huffman"][entry.path],
                file=entry.nbytes,
            )
        )
    return SizeReport(tuple(rows), len(data), overheads)
