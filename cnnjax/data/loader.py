"""The loader: Grain reads batches by number, so the position is one number, the next batch.

The Grain data source's elements are whole batches: workers prefetch them in order, small sets are
augmented a batch at a time, and a position does not depend on how many workers there are.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from cnnjax.data.augment import Augment
from cnnjax.data.batches import Batches
from cnnjax.data.sources import DatasetInfo, PathLike, default_data_dir, info


class Loader(Iterator[dict[str, np.ndarray]]):
    """An iterator over batches with an exact, portable position. Made by `loader`.

    Attributes:
      info: the data set.
      steps_per_epoch: batches in one pass.
      num_examples: examples in the split.
      image_shape: ``(height, width, channels)`` of a batch's images.
    """

    def __init__(self, batches: Batches, described: DatasetInfo, read: Any, processes: Any):
        self.info, self._batches, self._read, self._processes = described, batches, read, processes
        self.steps_per_epoch, self.num_examples = batches.per_epoch, batches.n
        self.image_shape = (*batches.size, batches.channels)
        self.batch_size = batches.batch_size
        self._position, self._iterator = 0, None

    def _start(self) -> Any:
        import grain

        source: Any = self._batches
        rest = grain.MapDataset.source(source)[self._position :]
        stream = rest.to_iter_dataset(self._read)
        if self._processes is not None:
            from absl import flags

            if not flags.FLAGS.is_parsed():  # Grain reads flags of its own, app.run or not
                flags.FLAGS.mark_as_parsed()
            stream = stream.mp_prefetch(self._processes)
        return iter(stream)

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._position >= len(self._batches):
            self.close()
            raise StopIteration
        if self._iterator is None:
            self._iterator = self._start()
        batch = next(self._iterator)
        if self._processes is not None:  # out of the shared memory, which ends with the workers
            batch = {k: np.array(v) for k, v in batch.items()}
        self._position += 1
        return batch

    @property
    def position(self) -> int:
        """Number of the next batch, counted from the start of training."""
        return self._position

    @property
    def epoch(self) -> int:
        """The epoch of the next batch."""
        return self._position // self.steps_per_epoch

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        """Batch ``number`` of the stream, without moving the position."""
        return self._batches[number]

    def get_state(self) -> dict[str, Any]:
        """The exact position and what it belongs to: plain JSON values."""
        b = self._batches
        return {
            "next_batch": self._position,
            "dataset": b.records.name,
            "split": b.records.split,
            "num_examples": b.n,
            "batch_size": b.batch_size,
            "seed": b.seed,
            "train": b.train,
            "drop_remainder": b.drop,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position from `get_state`, of any number of workers or processes.

        Raises:
          ValueError: the position belongs to another stream.
        """
        mine = self.get_state()
        if not isinstance(state, dict) or set(state) != set(mine):
            raise ValueError(f"not a loader's position: {state!r}; expected keys {sorted(mine)}")
        other = {k: (state[k], mine[k]) for k in mine if k != "next_batch" and state[k] != mine[k]}
        if other:
            told = ", ".join(f"{k} {was!r} (here {now!r})" for k, (was, now) in other.items())
            raise ValueError(f"this position belongs to another stream of batches: {told}")
        if not 0 <= state["next_batch"] <= len(self._batches):
            raise ValueError(f"position {state['next_batch']} is outside 0..{len(self._batches)}")
        self.close()
        self._position = int(state["next_batch"])

    def reset(self) -> Loader:
        """Back to the first batch, e.g. for the next evaluation. Returns itself."""
        self.close()
        self._position = 0
        return self

    def close(self) -> None:
        """Ends the workers; the position stays."""
        iterator, self._iterator = self._iterator, None
        if iterator is not None and hasattr(iterator, "close"):
            iterator.close()


def loader(
    name: str,
    split: str,
    *,
    batch_size: int,
    train: bool,
    seed: int = 0,
    augment: Augment | None = None,
    data_dir: PathLike | None = None,
    epochs: int | None = None,
    drop_remainder: bool | None = None,
    workers: int | None = None,
    worker_processes: bool = False,
    prefetch: int = 4,
    process_index: int | None = None,
    process_count: int | None = None,
    in_memory: bool | None = None,
) -> Loader:
    """Batches of a data set for this process: a checkpointable iterator over dicts of arrays.

    A batch holds ``image`` float32 ``(n, height, width, channels)`` and ``label`` int32 ``(n,)``;
    ``weight`` float32 ``(n,)`` (1, or 0 for the rows that fill up a short last batch) where
    ``drop_remainder`` is off; ``soft_label`` float32 ``(n, classes)`` in training with mixup or
    label smoothing. ``n`` is ``batch_size / process_count``, always.

    Training order and augmentation are drawn anew each epoch and depend on ``seed`` alone: the
    batches of all processes, put together, are the batch that a single process would get.

    Args:
      name: a TFDS name.
      split: ``"train"``, ``"test"``, or a slice like ``"train[:90%]"``.
      batch_size: examples per step over all processes.
      train: shuffled and augmented, or in stored order without randomness.
      seed: any int >= 0.
      augment: see `Augment`; the default only scales pixels to 0..1.
      data_dir: where the data lies; default ``$TFDS_DATA_DIR`` or ``~/tensorflow_datasets``.
      epochs: passes over the data; None: endless in training, one pass in evaluation.
      drop_remainder: leave out the short last batch; default: in training only.
      workers: parallel readers; 0 reads in the calling thread. Default: 1 for a split in memory
        (more only wait for each other), else one per core up to 16.
      worker_processes: readers are processes rather than threads (for costly JPEG decoding on many
        cores; the script needs ``if __name__ == "__main__"``).
      prefetch: batches kept ready.
      process_index: default ``jax.process_index()``.
      process_count: default ``jax.process_count()``.
      in_memory: keep the decoded split in memory; default: where that takes at most 1 GiB.

    Raises:
      ValueError: unknown data set or split, or arguments that do not fit.
      DatasetNotPreparedError: the data set is not in ``data_dir``.
    """
    import grain

    if (process_index is None) != (process_count is None):
        raise ValueError("give both process_index and process_count, or neither")
    if process_index is None or process_count is None:
        import jax

        process_index, process_count = jax.process_index(), jax.process_count()
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} is outside 0..{process_count - 1}")
    if seed < 0:
        raise ValueError(f"seed must be >= 0, got {seed}")
    if (workers or 0) < 0 or prefetch < 1:
        raise ValueError(f"workers must be >= 0 and prefetch >= 1, got {workers} and {prefetch}")
    described = info(name, data_dir)
    batches = Batches(
        described=described,
        split=split,
        batch_size=batch_size,
        train=train,
        seed=seed,
        augment=augment or Augment(),
        drop_remainder=train if drop_remainder is None else drop_remainder,
        epochs=epochs if train or epochs is not None else 1,
        process=(process_index, process_count),
        root=default_data_dir(data_dir),
        in_memory=in_memory,
    )
    if workers is None:
        workers = 1 if batches.images is not None else min(16, os.cpu_count() or 1)
    processes = None
    threads = workers
    if worker_processes and workers:
        processes = grain.MultiprocessingOptions(
            num_workers=workers, per_worker_buffer_size=prefetch
        )
        threads = 1
    read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(prefetch, threads))
    return Loader(batches, described, read, processes)
