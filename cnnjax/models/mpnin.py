"""MPNIN's initialisation: supervised pre-training of a NiN, one mlpconv block after the other.

Han, Dai, "Batch-normalized mlpconv-wise supervised pre-training network in network", Applied
Intelligence 48(1), 2018. The architecture is ``create("mpnin")``, a NiN with batch norm; fine-tune
the result end to end with any training loop. In a run: the stage ``pretrain_blocks``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from cnnjax.models import blocks
from cnnjax.models.nin import NiN

Batches = Iterable[tuple[Any, Any]]


class BlockStage(nnx.Module):
    """A NiN up to block ``index`` with a temporary head; only that block and the head learn.

    The blocks before it are frozen in evaluation mode: no drop-out, fixed batch statistics. The
    head is a 1x1 convolution to the classes and a global average pool; the last block has one map
    a class already and needs none.
    """

    def __init__(self, model: NiN, index: int, *, rngs: nnx.Rngs):
        count = len(model.mlps)
        if not 0 <= index < count:
            raise ValueError(f"index must be in 0 ... {count - 1}, got {index}")
        self.index = index
        self.model = model
        self.head = nnx.data(None)
        if index < count - 1 or model.config.head == "dense":
            width = model.mlps[index].units[-1].conv.out_features
            self.head = blocks.conv(width, model.config.num_classes, 1, use_bias=True, rngs=rngs)
        model.eval()
        model.mlps[index].train()

    def __call__(self, x: Any) -> Any:
        """(N, H, W, C) -> logits (N, num_classes)."""
        if self.index:
            # whatever mode a training loop has set: shares the variables
            frozen = nnx.view(
                self.model, deterministic=True, use_running_average=True, raise_if_not_found=False
            )
            for i in range(self.index):
                x = frozen.step(i, x)
        x = self.model.mlps[self.index](x)
        return blocks.global_avg_pool(x if self.head is None else self.head(x))

    def holds(self, path: str) -> bool:
        """Whether the array at ``path`` is of the present block or of the head."""
        return path.startswith(("head/", f"model/mlps/{self.index}/"))

    def learns(self, path: tuple[Any, ...], value: Any) -> bool:
        """Whether a variable is a parameter of the present block or of the head."""
        place = self.holds("/".join(map(str, path)))
        return place and getattr(value, "type", type(value)) is nnx.Param


def train_stage(
    stage: BlockStage, batches: Batches, optimizer: optax.GradientTransformation
) -> np.ndarray:
    """Trains the stage's block and head by cross-entropy; updates ``stage`` in place.

    Args:
      stage: what to train.
      batches: (images (N, H, W, C), integer labels (N,)) pairs.
      optimizer: its state starts afresh.

    Returns:
      The loss at every step (steps,).

    Raises:
      ValueError: if there are no batches.
    """
    graphdef, params, rest = nnx.split(stage, stage.learns, ...)

    @jax.jit
    def step(params: Any, rest: Any, opt_state: Any, x: Any, y: Any) -> Any:
        def loss_of(params: Any) -> Any:
            inner = nnx.merge(graphdef, params, rest, copy=True)
            losses = optax.softmax_cross_entropy_with_integer_labels(inner(x), y)
            return jnp.mean(losses), nnx.state(inner, nnx.Not(stage.learns))

        (loss, new_rest), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), new_rest, opt_state, loss

    opt_state = optimizer.init(params)
    losses = []
    for x, y in batches:
        params, rest, opt_state, loss = step(params, rest, opt_state, x, y)
        losses.append(loss)
    if not losses:
        raise ValueError("train_stage got no batches")
    nnx.update(stage, params, rest)
    return np.asarray(jax.device_get(losses))


def pretrain(
    model: NiN,
    batches: Callable[[int], Batches],
    optimizer: optax.GradientTransformation,
    *,
    rngs: nnx.Rngs,
) -> tuple[NiN, list[np.ndarray]]:
    """Pre-trains a copy of ``model`` block by block.

    Args:
      model: a NiN (``mpnin`` is the paper's); not changed.
      batches: ``batches(i)`` gives the (images, labels) pairs of stage i.
      optimizer: used in each stage, with a fresh state.
      rngs: stream ``params``, for the temporary heads.

    Returns:
      The pre-trained model in training mode, heads dropped, and the losses of each stage.

    Raises:
      TypeError: if ``model`` isn't a NiN.
    """
    if not isinstance(model, NiN):
        raise TypeError(f"pretrain takes a NiN, got {type(model).__name__}")
    model = nnx.clone(model)
    history = []
    for index in range(len(model.mlps)):
        stage = BlockStage(model, index, rngs=rngs)
        history.append(train_stage(stage, batches(index), optimizer))
        model = stage.model
    model.train()
    return model, history
