"""FractalNet with local and global drop-path.

Larsson, Maire, Shakhnarovich, "FractalNet: ultra-deep neural networks without residuals",
ICLR 2017, 1605.07648.

f_1(z) = conv(z); f_{C+1}(z) = join(f_C(f_C(z)), conv(z)), joins at the same depth merged into one
mean. The CIFAR network's stated widths give 33.7 M parameters, where the paper prints 38.6 M; the
ablation family's counts agree with the paper.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cnnjax.models import blocks
from cnnjax.models.registry import ModelConfig, check_choice, check_positive, check_rate, register


@dataclasses.dataclass(frozen=True, kw_only=True)
class FractalNetConfig(ModelConfig):
    """FractalNet variants.

    Attributes:
      columns: C; a block is 2^(C-1) convolutions deep.
      widths: channels of each block; their number is B.
      dropout: drop rate in each block (0 for all if empty).
      drop_path: rate p at which local drop-path drops each input of a join.
      stem: ``"none"`` (CIFAR) or ``"resnet"`` (7x7/2 and a pool, ImageNet).
    """

    num_classes: int = 10
    columns: int = 3
    widths: tuple[int, ...] = (64, 128, 256, 512, 512)
    dropout: tuple[float, ...] = ()
    drop_path: float = 0.15
    stem: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "columns")
        check_rate(self, "drop_path")
        check_choice(self, "stem", ("none", "resnet"))
        if not self.widths:
            raise ValueError("widths must hold at least one number")
        if self.dropout and len(self.dropout) != len(self.widths):
            raise ValueError(
                f"dropout needs one rate for each of {len(self.widths)} blocks, got {self.dropout}"
            )


class DropPath(nnx.Module):
    """Draws which columns live, once a batch; evaluation keeps all.

    Half of the batch (its first half) drops locally, the other half keeps one column of the whole
    network ("global").
    """

    def __init__(self, rate: float, columns: int, *, rngs: nnx.Rngs):
        self.rate = rate
        self.columns = columns
        self.deterministic = False
        self.rngs = rngs.dropout.fork()

    def set_view(self, deterministic: bool | None = None) -> None:
        """For ``nnx.view``.

        Args:
          deterministic: if True, keeps every column.
        """
        if deterministic is not None:
            self.deterministic = deterministic

    def __call__(self, batch: int) -> dict[str, Any] | None:
        """``{"key", "column" (N,), "whole" (N,) bool}`` for the joins of one pass, or None."""
        if self.deterministic or self.rate == 0.0 or self.columns == 1:
            return None
        key, local = jax.random.split(self.rngs())
        return {
            "key": local,
            "column": jax.random.randint(key, (batch,), 0, self.columns),
            "whole": jnp.arange(batch) >= (batch + 1) // 2,
        }


def join_mask(key: Any, active: tuple[int, ...], rate: float, column: Any, whole: Any) -> Any:
    """Which inputs of a join live, for each example.

    Args:
      key: the join's own random key.
      active: columns that meet here, J of them.
      rate: p of local drop-path.
      column: (N,) the global regime's column.
      whole: (N,) True where the global regime rules.

    Returns:
      (J, N) of 0 and 1; every example keeps at least one input. Where the global column does not
      take part all inputs stay (they reach nothing).
    """
    first, second = jax.random.split(key)
    joins, batch = len(active), column.shape[0]
    keep = jax.random.bernoulli(first, 1.0 - rate, (joins, batch))
    survivor = jax.random.randint(second, (batch,), 0, joins)
    saved = jnp.arange(joins)[:, None] == survivor
    keep = jnp.where(jnp.any(keep, axis=0), keep, saved)
    chosen = jnp.asarray(active)[:, None] == column
    chosen = jnp.where(jnp.any(chosen, axis=0), chosen, True)
    return jnp.where(whole, chosen, keep).astype(jnp.float32)


def join(inputs: list[Any], mask: Any = None) -> Any:
    """Mean over the living inputs: (N, H, W, C) each, ``mask`` (J, N) or None for all."""
    if len(inputs) == 1:
        return inputs[0]
    if mask is None:
        return sum(inputs[1:], start=inputs[0]) / len(inputs)
    weights = (mask / jnp.sum(mask, axis=0)).astype(inputs[0].dtype)[..., None, None, None]
    # where, not a product: a dropped input that is not finite must not spread
    return sum(
        (jnp.where(w > 0, w * x, 0) for w, x in zip(weights[1:], inputs[1:])),
        start=jnp.where(weights[0] > 0, weights[0] * inputs[0], 0),
    )


class FractalUnit(nnx.Module):
    """3x3 convolution, drop-out, batch norm, ReLU."""

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        dropout: float,
        rngs: nnx.Rngs,
        dtype: str | None = None,
    ):
        init = blocks.init.uniform_fan_in(1.0)
        self.conv = blocks.conv(in_features, features, 3, kernel_init=init, dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.bn = blocks.batch_norm(features, dtype=dtype, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        """(N, H, W, in) -> (N, H, W, out)."""
        return jax.nn.relu(self.bn(self.dropout(self.conv(x))))


class FractalBlock(nnx.Module):
    """C columns; column j has 2^(C-1-j) units, applied every 2^j steps.

    At step i every column with i mod 2^j = 0 applies its next unit to its own tensor; the results
    are joined, and all those columns go on from the mean.
    """

    def __init__(self, in_features: int, features: int, columns: int, rate: float, **options: Any):
        self.rate = rate
        self.columns = nnx.List(
            nnx.List(
                FractalUnit(features if i else in_features, features, **options)
                for i in range(2 ** (columns - 1 - j))
            )
            for j in range(columns)
        )

    def __call__(self, x: Any, paths: dict[str, Any] | None = None, only: int | None = None) -> Any:
        """(N, H, W, in) -> (N, H, W, out).

        Args:
          x: the block's input.
          paths: what `DropPath` drew; None for plain means.
          only: use this column alone (static), at evaluation.
        """
        count = len(self.columns)
        current, used = [x] * count, [0] * count
        for i in range(1, 2 ** (count - 1) + 1):
            active = tuple(j for j in range(count) if i % 2**j == 0)
            if only is not None:
                active = tuple(j for j in active if j == only)
                if not active:
                    continue
            outputs = []
            for j in active:
                outputs.append(self.columns[j][used[j]](current[j]))
                used[j] += 1
            mask = None
            if paths is not None and len(active) > 1:
                key = jax.random.fold_in(paths["key"], i)
                mask = join_mask(key, active, self.rate, paths["column"], paths["whole"])
            joined = join(outputs, mask)
            for j in active:
                current[j] = joined
        return current[count - 1 if only is None else only]


class FractalNet(blocks.Model):
    """B fractal blocks, each followed by 2x2/2 max pooling. Features ``block1`` ..., ``pool``."""

    def __init__(self, config: FractalNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.min_size = 2 ** len(config.widths) * (4 if config.stem == "resnet" else 1)
        channels = config.in_channels
        self.stem = nnx.data(None)
        if config.stem == "resnet":
            self.stem = blocks.ConvNorm(channels, 64, 7, 2, dtype=config.dtype, rngs=rngs)
            channels = 64
        self.drop_path = DropPath(config.drop_path, config.columns, rngs=rngs)
        rates = config.dropout or (0.0,) * len(config.widths)
        units = []
        for width, rate in zip(config.widths, rates):
            units.append(
                FractalBlock(
                    channels,
                    width,
                    config.columns,
                    config.drop_path,
                    dropout=rate,
                    dtype=config.dtype,
                    rngs=rngs,
                )
            )
            channels = width
        self.blocks = nnx.List(units)
        self.fc = blocks.linear(channels, config.num_classes, dtype=config.dtype, rngs=rngs)

    def forward(self, x: Any, taps: blocks.Taps, only: int | None = None) -> Any:
        """(N, H, W, C) -> logits."""
        paths = None if only is not None else self.drop_path(x.shape[0])
        if self.stem is not None:
            x = taps("stem", blocks.max_pool(self.stem(x), 3, 2, pad=1))
        for i, block in enumerate(self.blocks):
            here = paths and {**paths, "key": jax.random.fold_in(paths["key"], i)}
            if only is not None:
                x = block(x, None, only)
            else:
                x = blocks.run(block, x, here, remat=self.config.remat)
            x = blocks.max_pool(taps(f"block{i + 1}", x), 2)
        return self.fc(taps("pool", blocks.global_avg_pool(x)))

    def single_column(self, x: Any, column: int) -> Any:
        """Logits of one column alone (0: the deepest), a plain network inside the fractal.

        Args:
          x: images (N, H, W, C).
          column: 0 ... columns - 1.

        Raises:
          ValueError: no such column, or images that the network refuses.
        """
        if not 0 <= column < self.config.columns:
            raise ValueError(f"column must be in 0 ... {self.config.columns - 1}, got {column}")
        self._check(x)
        dtype = self.config.dtype
        x = x if dtype is None else jnp.asarray(x, dtype)
        logits = self.forward(x, blocks.Taps(), only=column)
        return logits if dtype is None else logits.astype(jnp.float32)


register(
    "fractalnet_cifar",
    FractalNet,
    FractalNetConfig(dropout=(0.0, 0.1, 0.2, 0.3, 0.4)),
    input_shape=(32, 32, 3),
)
register(
    "fractalnet34",
    FractalNet,
    FractalNetConfig(
        num_classes=1000, columns=4, widths=(128, 256, 512, 1024), drop_path=0.15, stem="resnet"
    ),
    input_shape=(224, 224, 3),
)
