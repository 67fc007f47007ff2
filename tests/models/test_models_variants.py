"""Variants beside the registered ones: what a field changes, and nothing else."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cnnjax import models
from cnnjax.models import mpnin


def params(name, **fields):
    state = nnx.state(models.abstract(name, **fields), nnx.Param)
    return sum(int(np.prod(v.shape)) for v in jax.tree.leaves(state))


def count(model, side, primitive, train=False):
    """How often a forward pass calls a primitive; nothing is computed."""
    (model.train if train else model.eval)()
    graphdef, state = nnx.split(model)
    x = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)

    def calls(jaxpr):
        total = 0
        for eqn in jaxpr.eqns:
            total += eqn.primitive.name == primitive
            inner = [getattr(v, "jaxpr", v) for v in eqn.params.values()]
            total += sum(calls(v) for v in inner if hasattr(v, "eqns"))
        return total

    return calls(jax.make_jaxpr(lambda s, x: nnx.merge(graphdef, s)(x))(state, x).jaxpr)


@pytest.mark.method("vgg16_cifar")
def test_dropout_between_the_convolutions_of_cifar_vgg():
    rates = (0.3, 0.4, 0.4, 0.4, 0.4)
    fields = {"stages": ((4, 4), (4, 4), (4, 4, 4), (4, 4, 4), (4, 4, 4)), "hidden": 8}
    model = models.create("vgg16_cifar", rngs=nnx.Rngs(0), dropout=rates, **fields)
    plain = models.create("vgg16_cifar", rngs=nnx.Rngs(0), **fields)
    nnx.update(plain, nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat)))
    # 13 convolutions, five of which begin a stage
    assert count(model, 32, "random_bits", train=True) == 8
    assert count(plain, 32, "random_bits", train=True) == 0
    assert count(model, 32, "random_bits") == 0
    assert [d.rate for d in model.drops] == list(rates)
    x = np.random.default_rng(0).standard_normal((2, 32, 32, 3)).astype(np.float32)
    model.eval()
    plain.eval()
    np.testing.assert_array_equal(nnx.jit(model)(x), nnx.jit(plain)(x))
    with pytest.raises(ValueError, match="one rate for each of 5 stages"):
        models.config("vgg16_cifar", dropout=(0.3,))
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        models.config("vgg16_cifar", dropout=(1.0,) * 5)


@pytest.mark.method("stochastic_depth")
def test_biases_of_stochastic_depths_code():
    """Each of the 1 + 6 n convolutions gets as many as it has outputs."""
    n = 18
    more = params("stochastic_depth_110", use_bias=True) - params("stochastic_depth_110")
    assert more == 16 + 2 * n * (16 + 32 + 64)


@pytest.mark.slow
@pytest.mark.method("inception_v3")
def test_the_last_pool_of_inception_v3():
    def pools(**fields):
        model = models.abstract("inception_v3", **fields)
        return [count(model, 96, f"reduce_window_{kind}") for kind in ("max", "sum")]

    most, sums = pools()
    # an average that leaves its border out divides by a second sum
    assert pools(last_pool="max") == [most + 1, sums - 2]
    assert params("inception_v3", last_pool="max") == params("inception_v3") == 23_834_568
    with pytest.raises(ValueError, match="last_pool 'mean' is not one of"):
        models.config("inception_v3", last_pool="mean")


@pytest.mark.method("nin")
def test_a_nin_with_batch_norm_and_a_dense_head():
    """The version beside Wide ResNet: ... 1x1 192 - average - dense."""
    convs = [75 * 192, 192 * 160, 160 * 96, 25 * 96 * 192, 192**2, 192**2, 9 * 192**2]
    widths = [192, 160, 96, *[192] * 6]
    want = sum(convs) + 2 * 192**2 + 3 * sum(widths) + 192 * 10 + 10  # a bias and an affine norm
    fields = {"batch_norm": True, "dropout": 0.0, "head": "dense"}
    assert params("nin_cifar", **fields) == want
    model = models.abstract("nin_cifar", num_classes=7, **fields)
    x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    logits, maps = nnx.eval_shape(lambda m, x: m(x, return_features="maps"), model, x)
    assert logits.shape == (2, 7)
    assert maps["maps"].shape == (2, 8, 8, 192)
    # its blocks can be pre-trained too, the last one with a temporary head as well
    small = models.create("nin_cifar", rngs=nnx.Rngs(0), num_classes=7, **fields)
    last = mpnin.BlockStage(small, 2, rngs=nnx.Rngs(1))
    assert nnx.eval_shape(lambda m, x: m(x), last, x).shape == (2, 7)
    with pytest.raises(ValueError, match="head 'fc' is not one of"):
        models.config("nin_cifar", head="fc")


@pytest.mark.method("preact_resnet")
def test_the_preactivation_network_of_keras():
    """Strides at the end of each stage but the last, by subsampling; some biases."""
    fields = {"stem": "bare", "keras": True}
    assert params("preact_resnet50", **fields) == 25_568_360
    model = models.abstract("preact_resnet50", **fields)
    x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    _, maps = nnx.eval_shape(lambda m, x: m(x, return_features=True), model, x)
    sides = [maps[f"layer{i}/{j}"].shape[1] for i in (1, 2, 3, 4) for j in (0, 2)]
    assert sides == [56, 28, 28, 28, 14, 14, 7, 7]
    assert maps["layer2/3"].shape[1] == 14
    with pytest.raises(ValueError, match="keras=True needs stem='bare'"):
        models.config("preact_resnet50", keras=True)
    with pytest.raises(ValueError, match="scan=False"):
        models.config("preact_resnet50", scan=True, **fields)
