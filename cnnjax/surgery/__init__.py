"""Surgery: a model with other layer shapes, other layers or fewer blocks; recorded and replayable.

Every function takes a model and returns a new one; the input is untouched.
"""

from __future__ import annotations

from cnnjax.surgery import flax_layers as _flax_layers  # noqa: F401  registers Flax's layers
from cnnjax.surgery.describe import Identity, build, describe, differences
from cnnjax.surgery.edit import (
    edit,
    fill,
    kinds,
    rebuild,
    remove,
    replace,
    replay,
    set_statics,
    take,
)
from cnnjax.surgery.encode import NotEncodable
from cnnjax.surgery.layers import register, registered
from cnnjax.surgery.record import Record, add_edit, base_of, edits_of, record_of, set_base
from cnnjax.surgery.walk import Parts, abstract, copy, leaves, map_leaves, module_at, modules, parts

__all__ = [
    "Identity",
    "NotEncodable",
    "Parts",
    "Record",
    "abstract",
    "add_edit",
    "base_of",
    "build",
    "copy",
    "describe",
    "differences",
    "edit",
    "edits_of",
    "fill",
    "kinds",
    "leaves",
    "map_leaves",
    "module_at",
    "modules",
    "parts",
    "rebuild",
    "record_of",
    "register",
    "registered",
    "remove",
    "replace",
    "replay",
    "set_base",
    "set_statics",
    "take",
]
