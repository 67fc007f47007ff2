"""Networks on circulant codes of their feature maps: exact where they can be, counted, refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import cnnjax
from cnnjax import factorization as f
from cnnjax import models, surgery

pytestmark = pytest.mark.method("circulant_feature_map")


class Net(nnx.Module):
    """conv (BN) act pool, conv, flatten, dense; ``skip`` adds the first maps to themselves."""

    def __init__(self, rngs, act=True, norm=True, skip=False):
        self.act, self.skip = act, skip
        self.a = nnx.Conv(2, 8, (3, 3), rngs=rngs)
        self.bn = nnx.BatchNorm(8, rngs=rngs) if norm else None
        self.b = nnx.Conv(8, 8, (3, 3), rngs=rngs)
        self.c = nnx.Linear(4 * 4 * 8, 3, rngs=rngs)

    def __call__(self, x):
        x = self.a(x)
        x = x if self.bn is None else self.bn(x)
        x = nnx.relu(x) if self.act else x
        x = nnx.avg_pool(x, (2, 2), (2, 2))
        y = self.b(x)
        y = y + x if self.skip else y
        y = nnx.relu(y) if self.act else y
        return self.c(y.reshape(len(y), -1))


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


X = normal(24, 8, 8, 2)


def run(model, x=X, train=False, taps="c"):
    view = nnx.view(model, use_running_average=not train, raise_if_not_found=False)
    graphdef, state = nnx.split(view)

    def call(state, x):
        y, found = cnnjax.graph.capture(nnx.merge(graphdef, state), {taps: "input"})(x)
        return y, found[taps]

    return [np.asarray(a) for a in jax.jit(call)(state, x)]


@pytest.fixture(scope="module")
def linear():
    model = Net(nnx.Rngs(0), act=False)
    model.bn.mean[...], model.bn.var[...] = normal(8), 1 + normal(8, seed=1) ** 2
    model.bn.scale[...], model.bn.bias[...] = 1 + normal(8, seed=2), normal(8, seed=3)
    return model


def test_whole_codes_and_low_ranks_are_exact_in_linear_networks(linear):
    same, rows = f.compact_maps(linear, {"[ab]": 1.0}, [X], example=X[:1], steps=10)
    expected = run(linear)[0]
    np.testing.assert_allclose(run(same)[0], expected, atol=1e-5 * np.abs(expected).max())
    assert [row.channels for row in rows] == [(8, 8), (8, 8)]
    np.testing.assert_allclose([row.energy for row in rows], 1.0, atol=1e-4)
    # responses of rank 3, means and all: three channels of the code hold them
    mix = normal(3, 8, seed=5)
    low = surgery.fill(
        linear,
        {
            "b/kernel": linear.b.kernel[...][..., :3] @ mix,
            "b/bias": normal(3, seed=6) @ mix,
        },
    )
    small, rows = f.compact_maps(low, {"b": 3}, [X[:12], X[12:]], example=X[:1])
    expected = run(low)[0]
    np.testing.assert_allclose(run(small)[0], expected, atol=1e-3 * np.abs(expected).max())
    assert rows[0].decoder_error["c"] < 1e-3
    assert small.b.kernel.shape == (3, 3, 8, 3)
    assert small.c.kernel.shape == (4 * 4 * 3, 3)
    assert rows[0].energy <= rows[0].best_energy + 1e-5


def test_decoders_are_least_squares_and_training_mode_agrees():
    model = Net(nnx.Rngs(1))
    model.bn.mean[...], model.bn.var[...] = 0.3 * normal(8), 1 + normal(8, seed=1) ** 2
    small, (row,) = f.compact_maps(model, {"a": 3}, [X], example=X[:1], steps=50)
    y, z = (run(m, taps="b")[1].reshape(-1, n) for m, n in ((model, 8), (small, 3)))
    decoder = np.linalg.lstsq(z, y, rcond=None)[0]
    best = np.linalg.norm(y - z @ decoder) / np.linalg.norm(y)
    np.testing.assert_allclose(row.decoder_error["b"], best, atol=1e-4)
    expected = np.einsum("kc,abco->abko", decoder, np.asarray(model.b.kernel[...]))
    np.testing.assert_allclose(np.asarray(small.b.kernel[...]), expected, atol=2e-3)
    # the BatchNorm's statistics are those of the code
    np.testing.assert_allclose(run(small)[0], run(small, train=True)[0], atol=1e-3)
    # the network is an ordinary one, which is saved by its edits
    again = surgery.replay(surgery.abstract(model), surgery.edits_of(small))
    again = surgery.fill(again, surgery.leaves(small))
    np.testing.assert_array_equal(run(again)[0], run(small)[0])
    assert cnnjax.profile(small, X[:1]).macs < cnnjax.profile(model, X[:1]).macs


def test_published_lenet_counts():
    def leaf(path, a):
        return jnp.asarray(0.1 * normal(*a.shape, seed=a.size), a.dtype)

    lenet = surgery.map_leaves(models.abstract("lenet_5_caffe"), leaf)
    names = [p for p, m in surgery.modules(lenet).items() if isinstance(m, nnx.Conv | nnx.Linear)]
    widths = dict(zip(names, (5, 20, 96)))
    x = normal(4, 28, 28, 1)
    small, _ = f.compact_maps(lenet, widths, [x], example=x[:1], steps=2, restarts=1)
    before, after = cnnjax.profile(lenet, x[:1]), cnnjax.profile(small, x[:1])
    assert (before.macs, after.macs) == (2_293_000, 263_680)
    assert (before.params, after.params) == (431_080, 34_436)


def test_what_cannot_be_coded(linear):
    for widths, message in (
        ({}, "widths is empty"),
        ({"nothing": 2}, "matches no convolution"),
        ({"a": 9}, "a: width is 9; expected 1 to 8"),
        ({"a": 0.0}, "a: width is the share 0.0"),
        ({"c": 2}, "c: its 3 channels can't be coded"),
    ):
        with pytest.raises(ValueError, match=message):
            f.compact_maps(linear, widths, [X], example=X[:1])
    residual = Net(nnx.Rngs(0), skip=True)
    with pytest.raises(ValueError, match="a: its 8 channels can't be coded: b/.* goes along"):
        f.compact_maps(residual, {"a": 2}, [X], example=X[:1])
