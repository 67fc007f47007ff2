"""Every name of the registry: classes, sizes, names of maps, refusals; on abstract values."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from cnnjax import models

QUICK = ("lenet_5_caffe", "nin_cifar", "resnet20_cifar", "mobilenet_v1_025")
NAMES = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in models.names()
]
# deep ones are traced once a stage
DEEP = ("1202", "1001", "398", "200", "190", "250", "264", "164", "152")


def fields_of(name):
    config = models.config(name)
    deep = any(mark in name for mark in DEEP) and hasattr(config, "scan")
    return {"num_classes": 7, **({"scan": True} if deep else {})}


@pytest.mark.parametrize("name", NAMES)
def test_any_classes_any_size_every_map_and_clear_refusals(name):
    fields = fields_of(name)
    model = models.abstract(name, **fields)
    model.eval()
    graphdef, state = nnx.split(model)
    side, _, channels = models.input_shape(name, **fields)

    def shapes(height, width, wanted=None, c=channels):
        x = jax.ShapeDtypeStruct((2, height, width, c), jnp.float32)
        return jax.eval_shape(
            lambda s, x: nnx.merge(graphdef, s)(x, return_features=wanted), state, x
        )

    # a size that the architecture wasn't written for, and not square
    sizes = (side, side) if model.exact_size else (side + 5, side + 8)
    logits, maps = shapes(*sizes, True)
    assert logits.shape == (2, 7)
    assert logits.dtype == jnp.float32
    assert maps
    assert all(m.shape[0] == 2 and m.ndim in (2, 4) for m in maps.values())
    # asked for by name, two at once
    names = list(maps)
    some = (names[0], names[-1])
    picked = shapes(*sizes, some)[1]
    assert {k: v.shape for k, v in picked.items()} == {k: maps[k].shape for k in some}
    with pytest.raises(ValueError, match=f"no feature '{names[0]}x' here"):
        shapes(*sizes, f"{names[0]}x")
    with pytest.raises(ValueError, match=f"built for {channels} input channels, got 9"):
        shapes(*sizes, c=9)
    if model.exact_size:
        with pytest.raises(ValueError, match=f"built for {side}x{side} images.*image_size="):
            shapes(side + 1, side)
    else:
        least = model.min_size
        assert shapes(least, least).shape == (2, 7)
        if least > 1:
            with pytest.raises(ValueError, match=f"at least {least}x{least}, got {least - 1}x"):
                shapes(least - 1, least)
