"""Paths, selection and counting over any Flax tree.

A *tree* here is an NNX ``State``, its pure dict, a Linen parameter dict, or any nested container of
arrays. A leaf's *path* is its keys joined by ``/``: ``"blocks/3/conv1/kernel"``. The wrappers that
NNX puts around a leaf (``Param.value``) are not part of the path, so the same path names the same
array in every form of the tree.

Globs: ``*`` matches within one path segment, ``**`` any number of whole segments, ``?`` and
``[...]`` as in ``fnmatch``. ``"layer*/**/kernel"`` matches ``"layer1/0/conv2/kernel"``.
"""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from cnnjax.errors import did_you_mean

PyTree = Any
Patterns = str | Sequence[str]


def path_string(keypath: Iterable[Any]) -> str:
    """The ``/``-joined path of a JAX key path, without NNX's ``.value`` wrappers."""
    parts = []
    for key in keypath:
        if isinstance(key, jax.tree_util.DictKey):
            parts.append(str(key.key))
        elif isinstance(key, jax.tree_util.SequenceKey):
            parts.append(str(key.idx))
        elif isinstance(key, jax.tree_util.GetAttrKey):
            if key.name not in ("value", "raw_value"):
                parts.append(key.name)
        elif isinstance(key, jax.tree_util.FlattenedIndexKey):
            # an NNX Variable flattens to its array under index 0
            continue
        else:
            parts.append(str(key))
    return "/".join(parts)


def flatten(tree: PyTree) -> dict[str, Any]:
    """``{path: leaf}`` in the tree's own leaf order.

    Raises:
      ValueError: if two leaves have the same path.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    out: dict[str, Any] = {}
    for keypath, leaf in leaves:
        path = path_string(keypath)
        if path in out:
            raise ValueError(f"two leaves have the path {path!r}; paths must be unique")
        out[path] = leaf
    return out


def map_with_path(fn: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """``jax.tree.map`` whose function gets the path first: ``fn(path, leaf, *others)``."""
    return jax.tree_util.tree_map_with_path(
        lambda keypath, *leaves: fn(path_string(keypath), *leaves), tree, *rest
    )


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The nested plain dict of ``{path: leaf}``; the inverse of `flatten` for nested dicts."""
    out: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = out
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = leaf
    return out


@functools.lru_cache(maxsize=4096)
def _glob_regex(pattern: str) -> re.Pattern[str]:
    out = []
    segments = pattern.split("/")
    for i, segment in enumerate(segments):
        last = i == len(segments) - 1
        if segment == "**":
            out.append(".*" if last else "(?:[^/]+/)*")
            continue
        body = fnmatch.translate(segment)
        body = body[body.index("(?s:") + 4 : body.rindex(")")]
        # `*` and `?` stay within one segment
        body = re.sub(r"(?<!\\)\.", "[^/]", body)
        out.append(body + ("" if last else "/"))
    return re.compile("".join(out) + r"\Z")


def glob_match(pattern: str, path: str) -> bool:
    """Whether the whole ``path`` matches the glob ``pattern`` (see the module's docstring)."""
    return _glob_regex(pattern).match(path) is not None


def match_any(patterns: Patterns, path: str) -> bool:
    """Whether ``path`` matches at least one of the globs."""
    if isinstance(patterns, str):
        patterns = (patterns,)
    return any(glob_match(p, path) for p in patterns)


def check_patterns(patterns: Patterns, paths: Iterable[str], *, what: str = "path") -> None:
    """Raises unless every glob matches at least one of ``paths``.

    Raises:
      ValueError: names the glob that matches nothing and the nearest paths.
    """
    if isinstance(patterns, str):
        patterns = (patterns,)
    paths = list(paths)
    for pattern in patterns:
        if not any(glob_match(pattern, p) for p in paths):
            raise ValueError(f"{what} {pattern!r} matches nothing.{did_you_mean(pattern, paths)}")


def select(tree: PyTree, include: Patterns = "**", exclude: Patterns = ()) -> PyTree:
    """A tree of Python bools: True where the path matches ``include`` and not ``exclude``.

    Raises:
      ValueError: if a glob matches no leaf (the message lists near matches).
    """
    paths = list(flatten(tree))
    check_patterns(include, paths)
    check_patterns(exclude, paths)
    return map_with_path(
        lambda path, _: match_any(include, path) and not match_any(exclude, path), tree
    )


def partition(tree: PyTree, chosen: PyTree) -> tuple[PyTree, PyTree]:
    """Splits a tree in two of the same structure, with ``None`` where a leaf went to the other."""
    yes = jax.tree.map(lambda leaf, c: leaf if c else None, tree, chosen)
    no = jax.tree.map(lambda leaf, c: None if c else leaf, tree, chosen)
    return yes, no


def combine(first: PyTree, second: PyTree) -> PyTree:
    """The inverse of `partition`: takes each leaf from the tree where it is not ``None``."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, first, second, is_leaf=lambda leaf: leaf is None
    )


def count(tree: PyTree) -> int:
    """Number of scalars (abstract leaves count too)."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def nonzeros(tree: PyTree) -> int:
    """Number of scalars that are not zero; -0.0 counts as zero, NaN as non-zero."""
    return sum(int(np.count_nonzero(np.asarray(leaf))) for leaf in jax.tree.leaves(tree))


def nbytes(tree: PyTree) -> int:
    """Bytes of all leaves in their own dtypes (abstract leaves count too)."""
    return sum(
        int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree)
    )


def check_same_structure(tree: PyTree, other: PyTree, *, what: str, of: str = "parameters") -> None:
    """Raises unless ``other`` has the same paths and shapes as ``tree``.

    Args:
      tree: the reference.
      other: the tree to check, e.g. a mask.
      what: what ``other`` is called in the message.
      of: what ``tree`` is called in the message.

    Raises:
      ValueError: lists missing paths, unknown paths and shape mismatches, all at once.
    """
    a, b = flatten(tree), flatten(other)
    problems = [f"missing: {p}" for p in a if p not in b]
    problems += [f"not in the {of}: {p}" for p in b if p not in a]
    problems += [
        f"shape of {p}: {tuple(b[p].shape)}, expected {tuple(a[p].shape)}"
        for p in a
        if p in b and np.shape(a[p]) != np.shape(b[p])
    ]
    if problems:
        shown = "; ".join(problems[:8]) + ("; ..." if len(problems) > 8 else "")
        raise ValueError(f"{what} does not match the {of} ({len(problems)} problems): {shown}")
