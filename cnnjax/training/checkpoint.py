"""Atomic checkpoints with Orbax: everything that an exact resume needs.

A checkpoint folder ``<directory>/<step>/`` appears by one rename when all its bytes are written; a
killed save leaves only a temporary folder, which the next start removes. Arrays are stored by
path, so a checkpoint of another network is refused by naming the paths that differ.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import os
import pathlib
import tempfile
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from cnnjax.training.state import TrainState

PyTree = Any
_FORMAT = 1


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read."""


class CheckpointMismatchError(CheckpointError, ValueError):
    """A checkpoint belongs to another network, optimizer or method."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint held: the state, the data iterator's position, and the run's config."""

    state: TrainState
    iterator: Any
    config: Any


def check_workdir(path: str | os.PathLike[str]) -> pathlib.Path:
    """Makes the folder and proves that files can be written there.

    Raises:
      OSError: (`PermissionError`, `NotADirectoryError`...) naming the folder.
    """
    folder = pathlib.Path(path).expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".writable") as probe:
            probe.write(b"x")
            probe.flush()
    except OSError as error:
        raise OSError(
            error.errno, f"the work folder cannot be written ({error.strerror})", str(folder)
        ) from error
    return folder


def _flat(tree: PyTree) -> dict[str, Any]:
    """``{path: array}``; random keys as their words, empty arrays left out (Orbax takes none)."""
    out = {}
    for keypath, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        if leaf.size:
            out[jax.tree_util.keystr(keypath, simple=True, separator="/")] = leaf
    return out


def _unflat(flat: dict[str, Any], template: PyTree) -> PyTree:
    leaves, treedef = jax.tree_util.tree_flatten_with_path(template)
    out = []
    for keypath, leaf in leaves:
        value = flat.get(jax.tree_util.keystr(keypath, simple=True, separator="/"), leaf)
        if value is not leaf and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            value = jax.random.wrap_key_data(value, impl=jax.random.key_impl(leaf))
        out.append(value)
    return jax.tree.unflatten(treedef, out)


@jax.jit
def _snapshot(flat: dict[str, Any]) -> dict[str, Any]:
    return jax.tree.map(jnp.copy, flat)


def _checksums(flat: dict[str, Any]) -> dict[str, int | None]:
    """CRC-32 of each array's bytes (Orbax keeps none of its own); None where it is split up."""
    out: dict[str, int | None] = {}
    for path, leaf in flat.items():
        if isinstance(leaf, jax.Array) and not leaf.is_fully_replicated:
            out[path] = None
            continue
        data = leaf.addressable_data(0) if isinstance(leaf, jax.Array) else leaf
        out[path] = zlib.crc32(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)
    return out


def _encode(position: Any) -> Any:
    if isinstance(position, bytes):
        return {"bytes": base64.b64encode(position).decode()}
    return {"json": position}


def _decode(record: Any) -> Any:
    return base64.b64decode(record["bytes"]) if "bytes" in record else record["json"]


def _gather(record: Any) -> list[Any]:
    """The record of every process, in order."""
    if jax.process_count() == 1:
        return [record]
    from jax.experimental import multihost_utils

    data = np.frombuffer(json.dumps(record).encode(), np.uint8)
    sizes = np.ravel(multihost_utils.process_allgather(np.asarray(data.size)))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: data.size] = data
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    return [json.loads(bytes(row[:n])) for row, n in zip(rows, sizes)]


class Checkpointer:
    """Saves and restores training states in one folder.

    Saving returns once the arrays are safe from later steps; writing goes on in the background.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int = 2,
        config: Any = None,
        background: bool = True,
    ) -> None:
        """Opens the folder and removes what killed saves left behind.

        Args:
          directory: made if missing.
          keep: how many newest checkpoints stay.
          config: JSON-able record of the run, stored with every checkpoint.
          background: write while training goes on.

        Raises:
          OSError: if the folder cannot be written.
          ValueError: if ``keep`` is less than 1.
          TypeError: if ``config`` is not JSON-able.
        """
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        json.dumps(config)
        self.directory = check_workdir(directory)
        self._config = config
        self._background = background
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                cleanup_tmp_directories=True,
                enable_async_checkpointing=background,
            ),
        )

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, None if there is none."""
        return max(self.steps(), default=None)

    def save(self, state: TrainState, *, iterator: Any = None, wait: bool = False) -> None:
        """Saves the state; a step that is already there is left as it is.

        Args:
          state: may be donated to the next step right after this returns.
          iterator: position of the data iterator (its ``get_state()``): bytes or JSON-able.
          wait: return only when the checkpoint is complete on the disk.

        Raises:
          CheckpointError: if this or the previous save failed; names the last good checkpoint.
        """
        step = int(state.step)
        self.wait()
        if step in self.steps():
            return
        flat = _flat(state)
        # an array on the CPU is written from the very buffer that the next step reuses
        flat = _snapshot(flat)
        meta = {
            "format": _FORMAT,
            "step": step,
            "tree": {k: [list(v.shape), str(v.dtype)] for k, v in flat.items()},
            "crc32": _checksums(flat),
            "iterators": _gather(_encode(iterator)),
            "config": self._config,
        }
        try:
            json.dumps(meta)
        except TypeError as error:
            raise CheckpointError(
                f"the data iterator's state is neither bytes nor JSON-able: {error}"
            ) from error
        try:
            self._write(step, flat, meta)
        except Exception as error:
            raise self._failed(step, error) from error
        if wait:
            self.wait()

    def _write(self, step: int, flat: dict[str, Any], meta: dict[str, Any]) -> None:
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(flat), meta=ocp.args.JsonSave(meta)
            ),
        )

    def _failed(self, step: int | None, error: Exception) -> CheckpointError:
        try:
            last = self.latest()
        except OSError:
            last = None
        which = "the checkpoint" if step is None else f"the checkpoint of step {step}"
        good = f"The last good one is step {last}." if last is not None else "There is no other."
        return CheckpointError(f"{which} in {self.directory} could not be saved: {error}. {good}")

    def wait(self) -> None:
        """Waits until the running save is complete.

        Raises:
          CheckpointError: if it failed.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failed(None, error) from error

    def restore(self, template: TrainState, *, step: int | None = None) -> Restored:
        """Reads a checkpoint into the form of ``template``.

        Args:
          template: a state with the wanted structure, shapes, dtypes and placement (e.g. a fresh
            one); its values are not used.
          step: which; default the newest.

        Raises:
          FileNotFoundError: if there is no checkpoint, or not this one.
          CheckpointMismatchError: if it belongs to another network; names the paths.
          CheckpointError: if files are missing or damaged; says what else there is.
        """
        steps = self.steps()
        if step is None:
            step = self.latest()
        if step is None or step not in steps:
            which = "no checkpoint" if step is None else f"no checkpoint of step {step}"
            raise FileNotFoundError(f"{which} in {self.directory}; there are: {steps or 'none'}")
        meta = self._read(step, meta=ocp.args.JsonRestore()).meta
        if meta.get("format") != _FORMAT:
            raise CheckpointError(
                f"checkpoint {step} in {self.directory} has format {meta.get('format')}, "
                f"this version reads {_FORMAT}"
            )
        flat = _flat(template)
        self._check_tree(step, meta["tree"], flat)
        abstract = {
            k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=getattr(v, "sharding", None))
            for k, v in flat.items()
        }
        stored = self._read(step, state=ocp.args.StandardRestore(abstract)).state
        sums = _checksums(stored)
        wrong = [k for k, v in meta["crc32"].items() if v is not None and sums[k] not in (None, v)]
        if wrong:
            raise self._damaged(step, f"wrong checksum of {', '.join(wrong[:8])}")
        positions = meta["iterators"]
        if all(p == positions[0] for p in positions):  # one position for all, however many
            positions = positions[:1] * jax.process_count()
        if len(positions) != jax.process_count():
            raise CheckpointMismatchError(
                f"checkpoint {step} in {self.directory} was written by {len(positions)} "
                f"processes, this run has {jax.process_count()}; the data position cannot be kept"
            )
        return Restored(
            state=_unflat(stored, template),
            iterator=_decode(positions[jax.process_index()]),
            config=meta["config"],
        )

    def _read(self, step: int, **args: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**args))
        except Exception as error:
            raise self._damaged(step, f"{type(error).__name__}: {str(error)[:500]}") from error

    def _damaged(self, step: int, why: str) -> CheckpointError:
        others = [s for s in self.steps() if s != step]
        hint = f"delete it to go on from step {max(others)}" if others else "there is no other"
        return CheckpointError(
            f"checkpoint {self.directory / str(step)} is damaged or incomplete ({hint}): {why}"
        )

    def _check_tree(self, step: int, stored: dict[str, Any], flat: dict[str, Any]) -> None:
        wanted = {k: [list(v.shape), str(v.dtype)] for k, v in flat.items()}
        problems = [f"missing: {k}" for k in wanted if k not in stored]
        problems += [f"not in this run: {k}" for k in stored if k not in wanted]
        problems += [
            f"{k}: {stored[k][1]}{stored[k][0]}, expected {wanted[k][1]}{wanted[k][0]}"
            for k in wanted
            if k in stored and stored[k] != wanted[k]
        ]
        if problems:
            shown = "; ".join(problems[:8]) + ("; ..." if len(problems) > 8 else "")
            raise CheckpointMismatchError(
                f"checkpoint {step} in {self.directory} is of another model, optimizer or method "
                f"({len(problems)} differences): {shown}. Use another work folder, or the "
                "configuration that wrote it."
            )

    def close(self) -> None:
        """Finishes the running save and releases the folder."""
        self.wait()
        self._manager.close()

    def abandon(self) -> None:
        """Releases the folder without raising; for use when another error is on its way."""
        with contextlib.suppress(Exception):
            self._manager.close()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()
