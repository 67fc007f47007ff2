"""What a distillation stage makes of its data: synthetic images, neurons worth imitating."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax import data, distillation
from cnnjax.data.memory import MemoryLoader
from cnnjax.pipeline.context import Context

_PROFILED = 2000  # images that neurons are profiled on


def training_images(context: Context, most: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Training images and labels in order, without augmentation, as networks see them."""
    c = context.data
    plain = dataclasses.replace(
        c.augment, pad=0, flip=False, random_resized_crop=None, mixup=0.0, label_smoothing=0.0,
        brightness=0.0, contrast=0.0, saturation=0.0, lighting=0.0,
    )  # fmt: skip
    loader = data.loader(
        c.name,
        c.train,
        batch_size=c.batch_size,
        train=False,
        augment=plain,
        data_dir=c.data_dir or None,
        workers=c.workers,
    )
    images, labels, seen = [], [], 0
    for batch in loader:
        real = np.asarray(batch.get("weight", np.ones(len(batch["label"])))) > 0
        images.append(np.asarray(batch["image"])[real])
        labels.append(np.asarray(batch["label"])[real])
        seen += int(real.sum())
        if most is not None and seen >= most:
            break
    loader.close()
    return np.concatenate(images)[:most], np.concatenate(labels)[:most]


def synthetic_stream(stage: Any, context: Context) -> Callable[[Any], Any]:
    """``loader -> batches`` of synthetic images instead; labels are -1, which no term may read."""
    images, _ = training_images(context)
    flat = images.reshape(len(images), -1)
    size = stage.multiplier * len(flat)
    if stage.synthetic == "munge":
        made = distillation.munge(
            context.key("munge"), flat, k=stage.multiplier, p=stage.swap, s=stage.spread
        )
    else:
        made = distillation.independent_marginals(context.key("marginals"), flat, size=size)
    made = np.clip(np.asarray(made), flat.min(0), flat.max(0)).reshape(size, *images.shape[1:])
    arrays = {
        "image": made.astype(np.float32),
        "label": np.full(size, -1, np.int32),
    }
    # the same on every resume: a function of the run's seed and the stage
    seed = int(jax.random.randint(context.key("order"), (), 0, 2**31 - 1))
    batch = min(context.data.batch_size, size)
    return lambda loader: MemoryLoader(arrays, batch_size=batch, seed=seed)


def chosen_neurons(plan: Any, guide: Any, context: Context) -> Any:
    """The plan with the teacher's neurons that tell classes apart and not nuisances.

    Luo et al.'s identity attributes are the classes, one against the rest; the nuisances are made:
    mirrored, darkened and blurred copies against the rest.
    """
    images, labels = training_images(context, _PROFILED)
    ((_, tap),) = plan.neurons
    call = jax.jit(lambda constants, x: guide(constants, x).features[tap])
    blurred = (np.roll(images, 1, 1) + images + np.roll(images, 1, 2)) / 3
    copies = [images, images[:, :, ::-1], 0.6 * images, blurred]
    acts = [np.asarray(call(guide.constants, jnp.asarray(x, jnp.float32))) for x in copies]
    kind = np.repeat(np.arange(len(copies)), len(images))
    classes = np.unique(labels)
    # classes are judged on the images as they are; nuisances on all copies
    identity = distillation.neuron_profile(acts[0], labels[:, None] == classes)
    nuisance = distillation.neuron_profile(
        np.concatenate(acts), kind[:, None] == np.arange(1, len(copies))
    )
    profile = np.concatenate([np.asarray(identity), np.asarray(nuisance)], axis=1)
    is_identity = np.arange(profile.shape[1]) < len(classes)
    alive = np.flatnonzero(acts[0].std(0) > 1e-6)  # neurons that never fire carry nothing
    count = plan.config.neuron_count
    if count > len(alive):
        raise ValueError(
            f"neuron_count is {count}, but only {len(alive)} of the {acts[0].shape[1]} neurons of "
            f"{tap!r} ever change"
        )
    index, _ = distillation.select_neurons(profile[alive], is_identity, count)
    selected = alive[np.asarray(index)]
    return plan.with_neurons(selected, acts[0][:, selected].std(0))
