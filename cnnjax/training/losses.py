"""Classification loss and exact, weighted classification counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, Shaped


def softmax_cross_entropy(
    logits: Float[Array | np.ndarray, "n c"],
    labels: Shaped[Array, ...],
    *,
    label_smoothing: int | float = 0.0,
) -> Float[Array, " n"]:
    """Cross-entropy of each example, in float32 nats.

    Args:
      logits: ``(n, c)``.
      labels: class numbers ``(n,)``, or probabilities ``(n, c)`` (mixup, soft targets).
      label_smoothing: weight ``e`` of the uniform distribution: the target becomes
        ``(1 - e) y + e / c`` (Szegedy et al. 2016, 1512.00567, section 7).

    Returns:
      Losses ``(n,)``.

    Raises:
      ValueError: if the labels' shape fits neither form, or the smoothing is outside [0, 1).
    """
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    logp = jax.nn.log_softmax(jnp.asarray(logits, jnp.float32), axis=-1)
    labels = jnp.asarray(labels)
    if labels.shape == logits.shape[:1]:
        nll = -jnp.take_along_axis(logp, labels[:, None].astype(jnp.int32), axis=-1)[:, 0]
    elif labels.shape == logits.shape:
        nll = -jnp.sum(labels.astype(jnp.float32) * logp, axis=-1)
    else:
        raise ValueError(
            f"labels of shape {labels.shape} fit neither (n,) nor (n, c) of logits {logits.shape}"
        )
    if label_smoothing:
        nll = (1.0 - label_smoothing) * nll - label_smoothing * jnp.mean(logp, axis=-1)
    return nll


def weighted_mean(
    values: Shaped[Array | np.ndarray, " n"], weights: Any = None
) -> Float[Array, ""]:
    """Mean over examples; weights 0 leave padding out, a batch of padding alone gives 0."""
    values = jnp.asarray(values, jnp.float32)
    if weights is None:
        return jnp.mean(values)
    weights = jnp.asarray(weights, jnp.float32)
    return jnp.sum(values * weights) / jnp.maximum(jnp.sum(weights), 1e-12)


def label_rank(logits: Float[Array | np.ndarray, "n c"], labels: Any) -> Num[Array, " n"]:
    """Rank of the label's logit, 0 = best; ties go to the lower class number, as in argmax.

    Rows with a NaN count as last, so a broken network never scores.
    """
    logits, labels = jnp.asarray(logits, jnp.float32), jnp.asarray(labels)
    if labels.ndim == 2:
        labels = jnp.argmax(labels, axis=-1)
    labels = labels.astype(jnp.int32)
    own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    lower = jnp.arange(logits.shape[-1])[None, :] < labels[:, None]
    rank = jnp.sum((logits > own) | ((logits == own) & lower), axis=-1)
    return jnp.where(jnp.any(jnp.isnan(logits), axis=-1), logits.shape[-1], rank)


def classification_loss(
    label_smoothing: int | float = 0.0,
    *,
    image: str = "image",
    label: str = "label",
    auxiliary: int | float = 0.0,
) -> Any:
    """The default loss hook: cross-entropy of ``model(batch["image"])``.

    Args:
      label_smoothing: see `softmax_cross_entropy`.
      image: the batch's key of the images.
      label: the batch's key of the class numbers.
      auxiliary: weight of each auxiliary classifier of an Inception network; if not 0, the model
        is called with ``aux=True`` and returns ``(logits, auxiliary logits, ...)``.

    Returns:
      ``loss(model, batch, context) -> (scalar, metrics)``. Where the batch has them,
      ``batch["soft_label"]`` ``(n, c)`` replaces the labels in the loss (give no smoothing here if
      the data smooths them already) and ``batch["weight"]`` ``(n,)`` weighs the examples.
      Metrics: ``accuracy`` (top-1 against ``batch["label"]``).
    """

    def loss(model: Any, batch: Mapping[str, Any], context: Any) -> tuple[Any, dict[str, Any]]:
        del context
        labels, weight = batch[label], batch.get("weight")
        target = batch.get("soft_label", labels)

        def cost(logits: Any) -> Any:
            each = softmax_cross_entropy(logits, target, label_smoothing=label_smoothing)
            return weighted_mean(each, weight)

        if auxiliary:
            logits, *others = model(batch[image], aux=True)
            value = cost(logits) + auxiliary * sum(cost(z) for z in others)
        else:
            logits = model(batch[image])
            value = cost(logits)
        hit = label_rank(jax.lax.stop_gradient(logits), labels) < 1
        return value, {"accuracy": weighted_mean(hit, weight)}

    return loss
