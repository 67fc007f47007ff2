"""Batches by number: any batch of any epoch is a pure function of (seed, its number)."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from cnnjax.data import transforms
from cnnjax.data.augment import Augment
from cnnjax.data.sources import DatasetInfo, Records, arrays, decode_image

_MEMORY_LIMIT = 2**30  # decoded bytes up to which a split is kept in memory by default


class Batches:
    """Random access to batches: ``self[i]`` is batch ``i`` of the endless training stream."""

    def __init__(
        self,
        *,
        described: DatasetInfo,
        split: str,
        batch_size: int,
        train: bool,
        seed: int,
        augment: Augment,
        drop_remainder: bool,
        epochs: int | None,
        process: tuple[int, int],
        root: str,
        in_memory: bool | None,
    ):
        index, count = process
        if batch_size < 1 or batch_size % count:
            raise ValueError(
                f"batch_size {batch_size} (over all processes) must be a positive multiple of the "
                f"number of processes, {count}"
            )
        self.train, self.seed, self.augment, self.batch_size = train, seed, augment, batch_size
        self.classes, self.drop = described.num_classes, drop_remainder
        self.rows = slice(index * batch_size // count, (index + 1) * batch_size // count)
        self.local = batch_size // count
        self.size = augment.out_size(described.image_shape, train=train)
        if train and augment.mixup and self.local % 2:
            raise ValueError(
                f"augmentation: mixup pairs the rows of a batch: {self.local} per process is odd"
            )
        self.records = Records(described.name, split, root)
        self.n = len(self.records)
        self.channels = self.records.channels
        fixed = None not in described.image_shape
        if in_memory is None:
            nbytes = self.n * np.prod([d or 0 for d in described.image_shape])
            in_memory = bool(fixed and nbytes <= _MEMORY_LIMIT)
        self.images = None
        self._padded = False
        if in_memory:
            self.images, self.labels = arrays(described.name, split, root)
            if train and augment.pad and augment.resize is None:
                self.images, self._padded = transforms.pad_images(self.images, augment), True
        self.per_epoch = self.n // batch_size if drop_remainder else -(-self.n // batch_size)
        if not self.per_epoch:
            raise ValueError(
                f"batch_size {batch_size} is larger than the {self.n} examples of "
                f"{described.name!r} {split!r}: not one whole batch (give drop_remainder=False)"
            )
        if epochs is not None and epochs < 1:
            raise ValueError(f"epochs must be at least 1, or None, got {epochs}")
        endless = sys.maxsize // self.per_epoch // 2
        self.total = self.per_epoch * (endless if epochs is None else epochs)
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.intp))

    def __len__(self) -> int:
        return self.total

    def __repr__(self) -> str:
        return f"Batches({self.records.name}, {self.records.split}, {self.batch_size})"

    def order(self, epoch: int) -> np.ndarray:
        """The records' order in an epoch."""
        if not self.train:
            return np.arange(self.n)
        known, order = self._order  # one tuple: safe under threads
        if known != epoch:
            order = np.random.default_rng([self.seed, 0, epoch]).permutation(self.n)
            self._order = (epoch, order)
        return order

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        number = int(index)
        epoch, step = divmod(number, self.per_epoch)
        start = step * self.batch_size
        chosen = self.order(epoch)[start : start + self.batch_size][self.rows]
        # drawn for the global batch: the same for any number of processes
        rng = np.random.default_rng([self.seed, 1, number])
        u = rng.random((self.batch_size, transforms.COLUMNS))[self.rows] if self.train else None
        images, labels = self._geometry(chosen, u)
        missing = self.local - len(chosen)
        if missing:
            images = np.concatenate([images, np.zeros((missing, *images.shape[1:]), np.uint8)])
            labels = np.concatenate([labels, np.zeros(missing, np.int32)])
        x = transforms.pixels(images, u, self.augment, train=self.train)
        batch = {"image": x, "label": labels}
        if not self.drop:
            weight = np.zeros(self.local, np.float32)
            weight[: len(chosen)] = 1.0
            batch["weight"] = weight
        if self.train and self.augment.soft:
            soft = transforms.soft_labels(labels, self.classes, self.augment.label_smoothing)
            if self.augment.mixup:
                lam = float(rng.beta(self.augment.mixup, self.augment.mixup))
                batch["image"], soft = transforms.mix(x, lam), transforms.mix(soft, lam)
            batch["soft_label"] = soft
        return batch

    def _geometry(self, chosen: np.ndarray, u: Any) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 ``(m, *size, channels)`` and labels ``(m,)`` of the chosen records."""
        spec, train = self.augment, self.train
        if not len(chosen):  # a process whose whole share of the last batch is padding
            return np.empty((0, *self.size, self.channels), np.uint8), np.empty(0, np.int32)
        if u is not None:
            u = u[: len(chosen)]
        box = spec.random_resized_crop if train else None
        if self.images is not None:
            labels = self.labels[chosen]
            if box is None and spec.resize is None:
                return self._cut(self.images, chosen, u, padded=self._padded), labels
            images = list(self.images[chosen])
        else:
            encoded, labels = self.records.encoded(chosen.tolist())
            images = [decode_image(e, self.channels) for e in encoded]
        if box is not None:
            assert u is not None  # only in training
            images = [
                transforms.resample(x, transforms.random_box(row, *x.shape[:2], box), self.size)
                for x, row in zip(images, u, strict=True)
            ]
        elif spec.resize is not None:  # shorter sides are equal now, longer ones differ
            small = [transforms.shrink(x, spec.resize) for x in images]
            first = np.zeros(1, np.intp)
            cut = [
                self._cut(x[None], first, None if u is None else u[i : i + 1])
                for i, x in enumerate(small)
            ]
            return np.concatenate(cut), labels
        return self._cut(np.stack(images), np.arange(len(images)), u), labels

    def _cut(self, images: Any, rows: Any, u: Any, *, padded: bool = False) -> np.ndarray:
        return transforms.geometry(
            images, rows, u, self.augment, self.size, train=self.train, padded=padded
        )
