"""The papers' training recipes in short: what the configs of CIFAR and ImageNet have in common.

A config names its network, its recipe and the published figure; images, normalisation and the
evaluation are the same for all of one kind and stand here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cnnjax.data import Augment
from cnnjax.errors import did_you_mean
from cnnjax.pipeline.config import DataConfig, ModelSpec, config_dict
from cnnjax.pipeline.context import Recipe
from cnnjax.pipeline.stages import Pretrained, Train

# per channel, of pixels in 0..1
STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar10_jpeg": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "torch": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    # pixels to [-1, 1], as TensorFlow's models have them
    "tf": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


def _statistics(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if name not in STATISTICS:
        raise ValueError(f"no pixel statistics {name!r}.{did_you_mean(name, STATISTICS)}")
    return STATISTICS[name]


def _expected(error: float | None, source: str, more: Mapping[str, Any] | None) -> dict[str, Any]:
    """The figure beside the measured one; an error is a fraction."""
    figure = {} if error is None else {"error": error}
    return {"train": {**figure, "source": source, **(more or {})}}


def cifar(
    name: str,
    model: str,
    recipe: Recipe,
    *,
    batch_size: int,
    error: float | None,
    source: str,
    fields: Mapping[str, Any] | None = None,
    data: str = "cifar10",
    augment: Mapping[str, Any] | None = None,
    seeds: Sequence[int] = (0,),
    train: str = "train",
    test: str = "test",
    eval_batch_size: int = 500,
    more: Mapping[str, Any] | None = None,
    before: Mapping[str, Any] | None = None,
) -> Any:
    """The config of one training run on CIFAR.

    Args:
      name: of the run.
      model: name of the registry.
      recipe: of the training.
      batch_size: images per step.
      error: the published test error, a fraction; None where the paper prints none.
      source: of that figure.
      fields: of the model.
      data: TFDS name; its statistics normalise the pixels.
      augment: replacements for the standard augmentation (zero-pad 4, crop, mirror).
      seeds: of the runs.
      train, test: splits, slices allowed.
      eval_batch_size: images per evaluation step.
      more: further entries of the expected figures: ``note``, or ``floor``, the share of the test
        images that must be right, which the report compares.
      before: stages ahead of the training.

    Raises:
      ValueError: no statistics of ``data``.
    """
    mean, std = _statistics(data)
    options: dict[str, Any] = {"pad": 4, "flip": True, "mean": mean, "std": std, **(augment or {})}
    return config_dict(
        name,
        model=ModelSpec(model, dict(fields or {})),
        data=DataConfig(
            data,
            train=train,
            test=test,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            augment=Augment(**options),
        ),
        stages={**(before or {}), "train": Train(recipe)},
        seeds=seeds,
        expected=_expected(error, source, more),
    )


def short_cifar(
    name: str,
    model: str,
    recipe: Recipe,
    *,
    images: int,
    floor: float,
    fields: Mapping[str, Any] | None = None,
) -> Any:
    """A short run on part of the JPEG copy of CIFAR-10, against a floor stated before it.

    Args:
      name, model, recipe, fields: as for `cifar`.
      images: training images; 2,000 test images count.
      floor: share of these that must be right.
    """
    return cifar(
        name,
        model,
        recipe,
        fields=fields,
        batch_size=64,
        data="cifar10_jpeg",
        train=f"train[:{images}]",
        test="test[:2000]",
        error=None,
        source="floor stated before the run",
        more={"floor": floor},
    )


def published_cifar(
    name: str, model: str, stages: Mapping[str, Any], *, seeds: Sequence[int] = (0,)
) -> Any:
    """The config that compresses a network with published weights on the JPEG copy of CIFAR-10.

    Stage ``published`` comes first: ``--config.stages.published.weights=FILE`` names the weights,
    which were trained with ImageNet's pixel statistics.

    Args:
      name: of the run.
      model: name of the registry; ten classes.
      stages: what is done to it.
      seeds: of the runs.
    """
    mean, std = _statistics("torch")
    network = ModelSpec(model, {"num_classes": 10})
    return config_dict(
        name,
        model=network,
        data=DataConfig(
            "cifar10_jpeg",
            batch_size=128,
            eval_batch_size=1000,
            augment=Augment(pad=4, flip=True, mean=mean, std=std),
        ),
        stages={"published": Pretrained("", network), **stages},
        seeds=seeds,
    )


def imagenet(
    name: str,
    model: str,
    recipe: Recipe,
    *,
    batch_size: int,
    error: float | None,
    source: str,
    fields: Mapping[str, Any] | None = None,
    size: int = 224,
    resize: int | None = None,
    statistics: str = "torch",
    crop: tuple[float, float] | None = (0.08, 1.0),
    augment: Mapping[str, Any] | None = None,
    more: Mapping[str, Any] | None = None,
) -> Any:
    """The config of one training run on ImageNet (ILSVRC-2012; errors are top-1, one crop).

    Args:
      name: of the run.
      model: name of the registry.
      recipe: of the training.
      batch_size: images per step.
      error: the published top-1 error on the validation set, a fraction, or None.
      source: of that figure.
      fields: of the model.
      size: side of the crop.
      resize: shorter side before the centre crop; 8/7 of ``size`` unless given.
      statistics: ``"torch"`` or ``"tf"``.
      crop: share of the area that a random crop takes; None: a random crop of ``size`` from the
        resized image isn't resized again (AlexNet, VGG).
      augment: further fields of `cnnjax.data.Augment`.
      more: further entries of the expected figures.
    """
    mean, std = _statistics(statistics)
    options: dict[str, Any] = {
        "size": size,
        "resize": round(size * 8 / 7) if resize is None else resize,
        "random_resized_crop": crop,
        "flip": True,
        "mean": mean,
        "std": std,
        **(augment or {}),
    }
    return config_dict(
        name,
        model=ModelSpec(model, dict(fields or {})),
        data=DataConfig(
            "imagenet2012",
            test="validation",
            batch_size=batch_size,
            augment=Augment(**options),
        ),
        stages={"train": Train(recipe)},
        expected=_expected(error, source, more),
    )
