"""Winograd convolutions (oracles: direct convolution in float64, loops, finite differences)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from cnnjax import coding, training
from cnnjax.coding import multiplications, winograd

conv = jax.jit(winograd.conv, static_argnames=("m", "padding"))
pytestmark = pytest.mark.method("sparse_winograd")


def direct(x, kernel, padding):
    """3x3 convolution with stride 1 by nine shifted products, in float64."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    if padding == "SAME":
        x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    ho, wo = x.shape[1] - 2, x.shape[2] - 2
    return sum(x[:, i : i + ho, j : j + wo] @ kernel[i, j] for i in range(3) for j in range(3))


def inputs(shape=(2, 7, 9, 3), features=4, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=shape), rng.normal(size=(3, 3, shape[-1], features))


@pytest.mark.parametrize("m", [2, 4])
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("size", [(7, 9), (8, 5), (3, 4)])
def test_dense_winograd_equals_direct_convolution(m, padding, size):
    x, kernel = inputs((2, *size, 3))
    expected = direct(x, kernel, padding)
    single = conv(jnp.asarray(x, "f4"), jnp.asarray(kernel, "f4"), m=m, padding=padding)
    assert single.shape == expected.shape
    tolerance = 1e-5 * (1 if m == 2 else 4)  # of the largest sum, about 15
    np.testing.assert_allclose(single, expected, atol=tolerance * np.abs(expected).max())
    with jax.enable_x64(True):
        double = conv(jnp.asarray(x), jnp.asarray(kernel), m=m, padding=padding)
        assert double.dtype == np.float64
        np.testing.assert_allclose(double, expected, atol=1e-12 * np.abs(expected).max())


@pytest.mark.parametrize("m", [2, 4])
def test_one_dimensional_identity_of_the_matrices(m):
    """A^T [(G g) * (B^T d)] is the correlation of d with g, exactly."""
    bt, g, at = winograd.matrices(m)
    rng = np.random.default_rng(0)
    d, f = rng.normal(size=m + 2), rng.normal(size=3)
    expected = np.array([d[i : i + 3] @ f for i in range(m)])
    np.testing.assert_allclose(at @ ((g @ f) * (bt @ d)), expected, atol=1e-13)


@pytest.mark.parametrize("m", [2, 4])
def test_the_kernel_map_has_rank_nine(m):
    basis = np.eye(9, dtype=np.float32).reshape(3, 3, 9, 1)
    image = np.asarray(winograd.transform_kernel(jnp.asarray(basis), m))
    assert np.linalg.matrix_rank(image.reshape((m + 2) ** 2, 9)) == 9


def test_transforms_destroy_sparsity():
    """What the Winograd-ReLU form is for: one non-zero weight fills 4 to 9 of 16 entries."""
    filled = []
    for at in range(9):
        kernel = np.zeros((3, 3, 1, 1), np.float32)
        kernel[at // 3, at % 3] = 1
        filled.append(int(np.count_nonzero(winograd.transform_kernel(jnp.asarray(kernel), 2))))
    assert sorted(set(filled)) == [4, 6, 9]
    x = np.maximum(np.random.default_rng(0).normal(size=(4, 16, 16, 8)), 0).astype("f4")
    tiles = winograd.tiles(jnp.asarray(x), 2)
    assert float(jnp.mean(tiles != 0)) == pytest.approx(0.93, abs=0.03)


@pytest.mark.parametrize("m", [2, 4])
def test_winograd_relu_equals_a_loop_over_tiles(m):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 5, 6, 3))
    weights = rng.normal(size=(m + 2, m + 2, 3, 4))
    mask = rng.random(weights.shape) < 0.4
    bt, _, at = winograd.matrices(m)
    th, tw = -(-5 // m), -(-6 // m)
    padded = np.zeros((2, th * m + 2, tw * m + 2, 3))
    padded[:, 1:6, 1:7] = x
    expected = np.zeros((2, th * m, tw * m, 4))
    for n in range(2):
        for i in range(th):
            for j in range(tw):
                for o in range(4):
                    total = np.zeros((m + 2, m + 2))
                    for c in range(3):
                        tile = padded[n, i * m : i * m + m + 2, j * m : j * m + m + 2, c]
                        active = np.maximum(bt @ tile @ bt.T, 0)
                        total += (weights * mask)[:, :, c, o] * active
                    expected[n, i * m : i * m + m, j * m : j * m + m, o] = at @ total @ at.T
    found = winograd.winograd_relu(
        jnp.asarray(x, "f4"), jnp.asarray(weights, "f4"), mask=mask, precision="highest"
    )
    np.testing.assert_allclose(found, expected[:, :5, :6], atol=2e-5 * np.abs(expected).max())


def test_a_zero_mask_gives_zero():
    x = jnp.ones((1, 6, 6, 2))
    weights = jnp.ones((4, 4, 2, 3))
    assert not np.asarray(winograd.winograd_relu(x, weights, mask=np.zeros((4, 4, 2, 3)))).any()


def loop_count(x, weights, m, relu):
    bt, _, _ = winograd.matrices(m)
    n, h, w, c = x.shape
    th, tw = -(-h // m), -(-w // m)
    padded = np.zeros((n, th * m + 2, tw * m + 2, c))
    padded[:, 1 : h + 1, 1 : w + 1] = x
    total = 0
    for b in range(n):
        for i in range(th):
            for j in range(tw):
                for k in range(c):
                    tile = padded[b, i * m : i * m + m + 2, j * m : j * m + m + 2, k]
                    tile = bt @ tile @ bt.T
                    active = tile > 0 if relu else tile != 0
                    for o in range(weights.shape[-1]):
                        total += int(np.sum(active & (weights[:, :, k, o] != 0)))
    return total


@pytest.mark.parametrize("relu", [True, False])
def test_the_operation_counter_equals_a_loop_count(relu):
    rng = np.random.default_rng(2)
    # small integers: no rounding decides about a zero
    x = rng.integers(-2, 3, (2, 5, 4, 3)).astype("f4")
    weights = rng.integers(-1, 2, (4, 4, 3, 5)).astype("f4")
    found = multiplications.sparse_winograd(x, weights, relu=relu)
    assert found == loop_count(x, weights, 2, relu)
    kernel = rng.integers(-1, 2, (3, 3, 3, 5))
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    total = 0
    for i in range(5):
        for j in range(4):
            patch = padded[:, i : i + 3, j : j + 3] != 0
            total += int(np.einsum("nhwc,hwco->", patch.astype(int), (kernel != 0).astype(int)))
    assert multiplications.sparse_direct(x, kernel) == total


def test_dense_counts():
    shape = (1, 8, 8, 16)
    assert multiplications.direct(shape, 32) == 8 * 8 * 9 * 16 * 32
    assert multiplications.direct(shape, 32) / multiplications.dense(shape, 32) == 2.25
    assert multiplications.direct(shape, 32) / multiplications.dense(shape, 32, m=4) == 4
    assert multiplications.direct((1, 5, 5, 2), 3, padding="VALID") == 9 * 9 * 2 * 3
    # all weights and activations there: the sparse counter gives the dense count
    x, weights = np.ones((1, 8, 8, 3), "f4"), np.ones((4, 4, 3, 2), "f4")
    active = np.asarray(winograd.tiles(jnp.asarray(x), 2) > 0).mean()
    found = multiplications.sparse_winograd(x, weights)
    assert found == round(active * multiplications.dense((1, 8, 8, 3), 2))
    # F(2x2): 4 rows of one addition each, on 4 columns and 4 rows; outputs 2 rows of two additions
    one_tile = multiplications.transform_additions((1, 2, 2, 1), 1)
    assert one_tile == 32 + 24


def test_gradients_match_finite_differences():
    rng = np.random.default_rng(3)
    with jax.enable_x64(True):
        x = jnp.asarray(rng.normal(size=(1, 4, 4, 2)))
        weights = jnp.asarray(rng.normal(size=(4, 4, 2, 2)))
        target = jnp.asarray(rng.normal(size=(1, 4, 4, 2)))

        @jax.jit
        def loss(x, weights):
            return jnp.sum((winograd.winograd_relu(x, weights) - target) ** 2)

        grads = jax.grad(loss, argnums=(0, 1))(x, weights)
        for argument, grad in enumerate(grads):
            at = tuple(rng.integers(0, n) for n in grad.shape)
            step = np.zeros(grad.shape)
            step[at] = 1e-6
            moved = [
                loss(*(a + sign * step if i == argument else a for i, a in enumerate((x, weights))))
                for sign in (1, -1)
            ]
            slope = float(moved[0] - moved[1]) / 2e-6
            assert float(grad[at]) == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("m", [2, 4])
def test_initial_variance(m):
    if m == 2:
        assert winograd.initial_variance(2, 10) == pytest.approx(2 * (9 / 32) / 160)
    layer = coding.WinogradReLU(32, 32, m=m, rngs=nnx.Rngs(0))
    expected = winograd.initial_variance(m, 32)
    assert np.var(np.asarray(layer.kernel[...])) == pytest.approx(expected, rel=0.04)
    x = np.random.default_rng(0).normal(size=(2, 12, 12, 32)).astype("f4")
    inside = np.asarray(nnx.jit(lambda net, x: net(x))(layer, x))[:, 2:-2, 2:-2]
    # unlike a ReLU of independent maps, tile entries have a positive mean: more than the estimate
    assert 0.3 < np.mean(inside**2) < 2.5


class Net(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = nnx.Conv(1, 8, (3, 3), rngs=rngs)
        self.conv2 = coding.WinogradReLU(8, 8, rngs=rngs)
        self.out = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        return self.out(jax.nn.relu(self.conv2(self.conv1(x))).mean(axis=(1, 2)))


def test_a_winograd_relu_net_trains_prunes_and_keeps_its_zeros():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 4, 128).astype("i4")
    x = rng.normal(size=(128, 8, 8, 1)).astype("f4") * 0.3
    for k in range(4):  # a bright quadrant
        i, j = 4 * (k // 2), 4 * (k % 2)
        x[y == k, i : i + 4, j : j + 4] += np.float32(k + 1) / 2

    def data():
        while True:
            yield {"image": x, "label": y}

    def accuracy(model):
        return float(np.mean(np.argmax(np.asarray(jitted(model, x)), axis=1) == y))

    jitted = nnx.jit(lambda model, x: model(x))
    model = Net(nnx.Rngs(0))

    def train(model, mask, steps):
        optimizer = optax.adam(1e-2)
        if mask is not None:
            freeze = jax.tree.map(lambda m: jnp.asarray(m, jnp.float32), mask)
            optimizer = optax.chain(
                optimizer, optax.stateless(lambda u, p: jax.tree.map(jnp.multiply, u, freeze))
            )
        network, state = training.create_state(model, optimizer)
        step = training.make_train_step(network, optimizer)
        config = training.FitConfig(steps, log_every=0, progress=False)
        return training.state_to_model(network, training.fit(step, state, data(), config).state)

    before = accuracy(model)
    model = train(model, None, 60)
    trained = accuracy(model)
    assert trained > max(0.9, before)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    mask = jax.tree.map(lambda w: np.ones(w.shape, bool), params)
    magnitude = np.abs(np.asarray(params["conv2"]["kernel"]))
    mask["conv2"]["kernel"] = magnitude > np.quantile(magnitude, 0.8)
    nnx.update(model, jax.tree.map(lambda w, m: w * m, params, mask))
    model = train(model, mask, 40)
    assert accuracy(model) > 0.9
    kernel = np.asarray(model.conv2.kernel[...])
    assert not kernel[~mask["conv2"]["kernel"]].any()
    hidden = np.asarray(model.conv1(jnp.asarray(x[:8])))
    sparse = multiplications.sparse_winograd(hidden, kernel)
    assert multiplications.direct(hidden.shape, 8) / sparse > 2.25 / 0.21


def test_bad_arguments():
    x, kernel = jnp.ones((1, 6, 6, 2)), jnp.ones((3, 3, 2, 4))
    with pytest.raises(ValueError, match="2 or 4"):
        winograd.conv(x, kernel, m=3)
    with pytest.raises(ValueError, match="padding"):
        winograd.conv(x, kernel, padding="FULL")
    with pytest.raises(ValueError, match="too small"):
        winograd.conv(x[:, :2], kernel, padding="VALID")
    with pytest.raises(ValueError, match="channels"):
        winograd.winograd_relu(x, jnp.ones((4, 4, 3, 4)))
    with pytest.raises(ValueError, match="2 or 4"):
        winograd.winograd_relu(x, jnp.ones((5, 5, 2, 4)))
    with pytest.raises(ValueError, match="positive"):
        coding.WinogradReLU(0, 4, rngs=nnx.Rngs(0))
