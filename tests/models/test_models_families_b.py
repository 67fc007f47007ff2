"""Whole networks: shapes at every stage, gradients, bfloat16, remat, modes, bad input."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cnnjax import models

# name, fields, image size: as small as the architecture allows
SMALL: list[tuple[str, dict[str, Any], int]] = [
    ("mobilenet_v1_025", {"num_classes": 5}, 32),
    ("mobilenet_v2_035", {"num_classes": 5}, 32),
    ("shufflenet_v1_g3", {"num_classes": 5, "scale": 0.25}, 32),
    ("cic", {"num_classes": 5}, 8),
    ("maxout_nin", {"num_classes": 5, "pieces": 2}, 8),
    ("mpnin", {"num_classes": 5}, 8),
    ("fractalnet_cifar", {"num_classes": 5, "widths": (8, 8), "dropout": (0.0, 0.1)}, 8),
]
LARGE: list[tuple[str, dict[str, Any], int]] = [
    ("googlenet", {"num_classes": 5, "aux_heads": True}, 64),
    ("googlenet_caffe", {"num_classes": 5}, 64),
    ("inception_v2", {"num_classes": 5}, 64),
    ("inception_v2_slim", {"num_classes": 5}, 64),
    ("inception_v3", {"num_classes": 5}, 75),
    ("inception_v4", {"num_classes": 5, "blocks": (1, 1, 1)}, 75),
    ("inception_resnet_v1", {"num_classes": 5, "blocks": (1, 1, 1)}, 75),
    ("inception_resnet_v2", {"num_classes": 5, "blocks": (1, 1, 1)}, 75),
    ("xception", {"num_classes": 5, "middle_blocks": 1}, 71),
    ("nin_imagenet", {"num_classes": 5}, 67),
    ("shufflenet_v1_g8", {"num_classes": 5}, 32),
    ("fractalnet34", {"num_classes": 5, "widths": (8, 8, 8, 8)}, 64),
]
# these compile for long
DEEP = ("mobilenet_v2_035", "shufflenet_v1_g3", "mpnin", "maxout_nin")
SOME = [pytest.param(*r, marks=[pytest.mark.slow] if r[0] in DEEP else []) for r in SMALL]
FEW = [
    pytest.param(*r, marks=[] if r[0] in ("cic", "mobilenet_v1_025") else [pytest.mark.slow])
    for r in SMALL
]
IDS = {"ids": lambda v: v if isinstance(v, str) else ""}


def _images(size: int, batch: int = 4) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((batch, size, size, 3)).astype(np.float32)


def _gradients(name: str, fields: dict[str, Any], x: np.ndarray, aux: bool = False) -> Any:
    """(loss, gradients, new statistics) of one training pass."""
    model = models.create(name, rngs=nnx.Rngs(0), **fields)
    model.train()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    labels = np.arange(len(x)) % fields["num_classes"]

    @jax.jit
    def run(params, rest, x):
        def loss_of(params):
            inner = nnx.merge(graphdef, params, rest, copy=True)
            out = inner(x, aux=True) if aux else (inner(x),)
            losses = [
                -jnp.mean(jax.nn.log_softmax(y)[jnp.arange(len(labels)), labels]) for y in out
            ]
            return sum(losses), nnx.state(inner, nnx.BatchStat)

        return jax.value_and_grad(loss_of, has_aux=True)(params)

    (loss, new), grads = run(params, rest, x)
    pure = nnx.to_pure_dict
    return loss, pure(grads), pure(new), pure(nnx.state(model, nnx.BatchStat))


def _check_training(name: str, fields: dict[str, Any], size: int, aux: bool = False) -> None:
    # enough images that drop-path leaves no path without any
    x = _images(size, 16 if name.startswith("fractalnet") else 4)
    loss, grads, new, old = _gradients(name, fields, x, aux)
    assert np.isfinite(loss)
    flat = jax.tree_util.tree_flatten_with_path(grads)[0]
    dead = [jax.tree_util.keystr(k) for k, g in flat if not np.isfinite(np.asarray(g)).all()]
    assert not dead
    # every kernel learns (a bias in front of a batch norm may not)
    still = [jax.tree_util.keystr(k) for k, g in flat if "kernel" in str(k) and not np.any(g)]
    assert not still
    for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
        assert np.any(np.asarray(a) != np.asarray(b))


@pytest.mark.parametrize(("name", "fields", "size"), SOME, **IDS)
def test_every_parameter_has_a_finite_gradient(name, fields, size):
    _check_training(name, fields, size)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "fields", "size"), LARGE, **IDS)
def test_every_parameter_has_a_finite_gradient_large(name, fields, size):
    _check_training(name, fields, size, aux=fields.get("aux_heads", False))


@pytest.mark.parametrize(("name", "fields", "size"), FEW, **IDS)
def test_bfloat16_and_evaluation(name, fields, size):
    """bfloat16 stays near float32, parameters stay float32, evaluation repeats exactly."""
    x = _images(size)
    model = models.create(name, rngs=nnx.Rngs(0), **fields)
    half = models.create(name, rngs=nnx.Rngs(0), dtype="bfloat16", **fields)
    assert all(v.dtype == jnp.float32 for v in jax.tree.leaves(nnx.state(half, nnx.Param)))
    out = {}
    for key, m in (("full", model), ("half", half)):
        m.eval()
        graphdef, state = nnx.split(m)
        run = jax.jit(lambda s, x, g=graphdef: nnx.merge(g, s)(x))
        out[key] = np.asarray(run(state, x))
        np.testing.assert_array_equal(out[key], np.asarray(run(state, x)))
    assert out["half"].dtype == np.float32
    scale = np.abs(out["full"]).max()
    assert np.abs(out["half"] - out["full"]).max() < 0.08 * scale + 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "fields", "size"), [r for r in SMALL if r[0] in ("mobilenet_v2_035", "mpnin")], **IDS
)
def test_remat_changes_nothing(name, fields, size):
    """Same loss, gradients and statistics (drop-out off: its keys are drawn in another order)."""
    x = _images(size)
    fields = {**fields, "dropout": 0.0}
    loss, grads, new, _ = _gradients(name, fields, x)
    loss2, grads2, new2, _ = _gradients(name, {**fields, "remat": True}, x)
    np.testing.assert_allclose(loss, loss2, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(grads2), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4 * max(1.0, np.abs(a).max()))
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(new2), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


# the catalogue's output columns, without batch
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "googlenet": {
        "conv1": (112, 112, 64),
        "pool1": (56, 56, 64),
        "pool2": (28, 28, 192),
        "inception3b": (28, 28, 480),
        "inception4a": (14, 14, 512),
        "inception4d": (14, 14, 528),
        "inception4e": (14, 14, 832),
        "inception5b": (7, 7, 1024),
    },
    "inception_v2": {
        "conv1": (112, 112, 64),
        "pool1": (56, 56, 64),
        "pool2": (28, 28, 192),
        "mixed_3b": (28, 28, 320),
        "mixed_3c": (14, 14, 576),
        "mixed_4d": (14, 14, 576),
        "mixed_4e": (7, 7, 1024),
        "mixed_5b": (7, 7, 1024),
    },
    "inception_v3": {
        "conv_4a": (71, 71, 192),
        "pool_5a": (35, 35, 192),
        "mixed_5b": (35, 35, 256),
        "mixed_5d": (35, 35, 288),
        "mixed_6a": (17, 17, 768),
        "mixed_6e": (17, 17, 768),
        "mixed_7a": (8, 8, 1280),
        "mixed_7c": (8, 8, 2048),
        "pool": (2048,),
    },
    "inception_v4": {
        "mixed_3a": (73, 73, 160),
        "mixed_4a": (71, 71, 192),
        "mixed_5a": (35, 35, 384),
        "inception_a3": (35, 35, 384),
        "reduction_a": (17, 17, 1024),
        "inception_b6": (17, 17, 1024),
        "reduction_b": (8, 8, 1536),
        "inception_c2": (8, 8, 1536),
    },
    "inception_resnet_v1": {
        "conv_5a": (35, 35, 256),
        "block_a4": (35, 35, 256),
        "reduction_a": (17, 17, 896),
        "block_b9": (17, 17, 896),
        "reduction_b": (8, 8, 1792),
        "block_c4": (8, 8, 1792),
    },
    "inception_resnet_v2": {
        "mixed_5b": (35, 35, 320),
        "reduction_a": (17, 17, 1088),
        "reduction_b": (8, 8, 2080),
        "block_c9": (8, 8, 2080),
        "conv_7b": (8, 8, 1536),
    },
    "xception": {
        "stem": (147, 147, 64),
        "entry/0": (74, 74, 128),
        "entry/1": (37, 37, 256),
        "entry/2": (19, 19, 728),
        "middle/7": (19, 19, 728),
        "exit": (10, 10, 1024),
        "tail": (10, 10, 2048),
    },
    "nin_cifar": {"block1": (32, 32, 96), "block2": (16, 16, 192), "maps": (8, 8, 10)},
    "nin_imagenet": {"block1": (54, 54, 96), "block2": (27, 27, 256), "maps": (6, 6, 1000)},
    "maxout_nin": {"block1": (32, 32, 96), "block2": (16, 16, 192), "block3": (8, 8, 10)},
    "fractalnet_cifar": {"block1": (32, 32, 64), "block5": (2, 2, 512), "pool": (512,)},
    "mobilenet_v1": {
        "stem": (112, 112, 32),
        "blocks/0": (112, 112, 64),
        "blocks/4": (28, 28, 256),
        "blocks/10": (14, 14, 512),
        "blocks/12": (7, 7, 1024),
    },
    "mobilenet_v2": {
        "blocks/0": (112, 112, 16),
        "blocks/2": (56, 56, 24),
        "blocks/5": (28, 28, 32),
        "blocks/9": (14, 14, 64),
        "blocks/16": (7, 7, 320),
        "head": (7, 7, 1280),
    },
    "shufflenet_v1_g3": {
        "stem": (112, 112, 24),
        "stage2": (28, 28, 240),
        "stage3/0": (14, 14, 480),
        "stage4": (7, 7, 960),
    },
}
HEAVY = {"inception_v4", "inception_resnet_v1", "inception_resnet_v2", "xception"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in HEAVY else []) for n in SHAPES]
)
def test_intermediate_maps(name):
    """Names and shapes of the maps at the standard input; another input size runs too."""
    model = models.abstract(name)
    model.eval()
    graphdef, state = nnx.split(model)

    def shapes(size, wanted):
        x = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
        return jax.eval_shape(
            lambda s, x: nnx.merge(graphdef, s)(x, return_features=wanted), state, x
        )

    size = models.input_shape(name)[0]
    logits, maps = shapes(size, tuple(SHAPES[name]))
    assert logits.shape == (2, model.config.num_classes)
    assert {k: v.shape[1:] for k, v in maps.items()} == SHAPES[name]
    assert set(shapes(size, True)[1]) >= set(SHAPES[name])
    other = math.ceil(max(model.min_size, size * 0.8)) | 1
    assert shapes(other, None).shape == logits.shape


@pytest.mark.method("googlenet")
def test_auxiliary_heads_run_only_when_asked_for():
    model = models.abstract("googlenet", num_classes=7, aux_heads=True)
    model.eval()
    graphdef, state = nnx.split(model)
    x = jax.ShapeDtypeStruct((2, 96, 96, 3), jnp.float32)
    run = lambda **kw: jax.eval_shape(  # noqa: E731
        lambda s, x: nnx.merge(graphdef, s)(x, **kw), state, x
    )
    assert run().shape == (2, 7)
    assert [y.shape for y in run(aux=True)] == [(2, 7)] * 3
    heads, maps = run(aux=True, return_features="inception3a")
    assert len(heads) == 3
    assert maps["inception3a"].shape == (2, 12, 12, 256)
    plain = models.abstract("googlenet", num_classes=7)
    with pytest.raises(ValueError, match="built without auxiliary heads"):
        plain(jnp.zeros((1, 64, 64, 3)), aux=True)
    paper = models.abstract("googlenet_caffe", num_classes=7, aux_heads=True)
    graphdef, state = nnx.split(paper)
    with pytest.raises(ValueError, match="needs a 14x14 map"):
        jax.eval_shape(lambda s, x: nnx.merge(graphdef, s)(x, aux=True), state, x)


@pytest.mark.method("inception_v3")
def test_auxiliary_head_names_its_smallest_grid():
    model = models.abstract("inception_v3", num_classes=7, aux_heads=True)
    model.eval()
    graphdef, state = nnx.split(model)
    x = jax.ShapeDtypeStruct((1, 128, 128, 3), jnp.float32)
    with pytest.raises(ValueError, match="at least 17x17, got 6x6"):
        jax.eval_shape(lambda s, x: nnx.merge(graphdef, s)(x, aux=True), state, x)


def test_bad_input():
    model = models.create("shufflenet_v1", scale=0.25, num_classes=3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="3 input channels, got 1"):
        model(jnp.zeros((1, 32, 32, 1)))
    small = models.abstract("inception_v3")
    with pytest.raises(ValueError, match="at least 75x75"):
        small(jnp.zeros((1, 64, 64, 3)))
    with pytest.raises(ValueError, match="groups must be one of 1, 2, 3, 4, 8"):
        models.config("shufflenet_v1", groups=5)
    with pytest.raises(ValueError, match="7 groups don't divide"):
        models.config("shufflenet_v1", groups=7, stage_width=280, stem_width=24)
    with pytest.raises(ValueError, match="width must be in"):
        models.config("mobilenet_v1", width=0.0)
    with pytest.raises(ValueError, match="Did you mean 'SAME'"):
        models.config("mobilenet_v2", padding="SAM")
    with pytest.raises(ValueError, match="window_size must be odd"):
        models.config("cic", window_size=2)
    with pytest.raises(ValueError, match="one rate for each of 5 blocks"):
        models.config("fractalnet_cifar", dropout=(0.1,))
    with pytest.raises(ValueError, match="no auxiliary heads here"):
        models.config("inception_v2", aux_heads=True)
    with pytest.raises(ValueError, match="blocks must be three numbers"):
        models.config("inception_v4", blocks=(1, 0, 2))
    with pytest.raises(ValueError, match="Did you mean"):
        models.create("mobilenet_v3", rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    "name", [pytest.param("mobilenet_v2_035", marks=pytest.mark.slow), "fractalnet_cifar"]
)
def test_training_draws_and_evaluation_does_not(name):
    fields = {"widths": (4, 4), "dropout": ()} if name.startswith("fractal") else {}
    model = models.create(name, num_classes=3, rngs=nnx.Rngs(0), **fields)
    x = _images(32, 2)

    @functools.partial(jax.jit, static_argnums=0)
    def twice(graphdef, state):
        model = nnx.merge(graphdef, state)
        return model(x), model(x)

    outcome = {}
    for mode in ("train", "eval"):
        getattr(model, mode)()
        a, b = twice(*nnx.split(model))
        outcome[mode] = float(np.abs(a - b).max() / np.abs(a).max())
    assert outcome["eval"] < 1e-5
    assert outcome["train"] > 1e-3
