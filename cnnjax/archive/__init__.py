"""Save and load any compressed network: base model, edits and arrays; no pickle, no code."""

from __future__ import annotations

from cnnjax.archive.arrays import ArchiveError
from cnnjax.archive.store import load, read_manifest, save

__all__ = ["ArchiveError", "load", "read_manifest", "save"]
