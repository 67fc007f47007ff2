"""A file that holds the running statistics too, on a residual network."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cnnjax import coding, models
from cnnjax import tree as treelib

pytestmark = pytest.mark.method("deep_compression")


@pytest.fixture(scope="module")
def network():
    """A small ResNet in evaluation mode with statistics of its own, and an input."""
    model = models.create("resnet20_cifar", num_classes=10, rngs=nnx.Rngs(0))
    model.eval()
    rng = np.random.default_rng(0)
    for _, module in nnx.iter_graph(model):
        if isinstance(module, nnx.BatchNorm):
            size = module.mean[...].shape
            module.mean[...] = jnp.asarray(rng.normal(0, 0.3, size), "f4")
            module.var[...] = jnp.asarray(rng.uniform(0.2, 2, size), "f4")
            module.scale[...] = jnp.asarray(rng.uniform(0.5, 1.5, size), "f4")
            module.bias[...] = jnp.asarray(rng.normal(0, 0.3, size), "f4")
    return model, jnp.asarray(rng.normal(size=(2, 16, 16, 3)), "f4")


def run(model, x):
    graphdef, state = nnx.split(model)
    return np.asarray(jax.jit(lambda s, x: nnx.merge(graphdef, s)(x))(state, x))


def test_the_file_alone_gives_the_network_back(network):
    model, x = network
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    coded = coding.complete(coding.share(params, 4, iterations=3), model)
    blob = coding.pack(coded)
    fresh = models.create("resnet20_cifar", num_classes=10, rngs=nnx.Rngs(7))
    fresh.eval()
    loaded = coding.restore(fresh, coding.decompress(blob))
    expected = treelib.flatten(coding.expand(coded))
    found = treelib.flatten(coding.variables(loaded))
    assert found.keys() == expected.keys()
    assert any(path.endswith("/var") for path in found)
    for path, leaf in found.items():
        assert np.asarray(leaf).tobytes() == np.asarray(expected[path]).tobytes(), path
    quantized = coding.restore(model, coding.expand(coded))
    np.testing.assert_array_equal(run(loaded, x), run(quantized, x))
    # a file of parameters alone leaves the statistics as they are
    partial = coding.restore(model, coding.decompress(coding.pack(coding.share(params, 4))))
    np.testing.assert_array_equal(
        treelib.flatten(coding.variables(partial))["bn1/mean"], model.bn1.mean[...]
    )


def test_absorbed_statistics_change_nothing_in_evaluation(network):
    model, x = network
    before = run(model, x)
    on_host = coding.restore(model, jax.device_get(coding.variables(model)))
    absorbed = coding.absorb_statistics(on_host)
    np.testing.assert_allclose(run(absorbed, x), before, rtol=2e-4, atol=2e-4)
    np.testing.assert_array_equal(run(model, x), before)  # the argument is untouched
    flat = treelib.flatten(coding.variables(absorbed))
    for path, leaf in flat.items():
        if path.endswith(("/mean", "/var")):
            np.testing.assert_array_equal(leaf, float(path.endswith("/var")))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    coded = coding.share(params, 4, iterations=3)
    large, small = (len(coding.pack(coding.complete(coded, m))) for m in (model, absorbed))
    statistics = sum(leaf.size for path, leaf in flat.items() if path.endswith(("/mean", "/var")))
    assert large - small > 3.5 * statistics


def test_what_does_not_belong_is_refused(network):
    model, _ = network
    coded = coding.share({"conv1": {"kernel": np.ones((3, 3, 3, 15), "f4")}}, 2)
    with pytest.raises(ValueError, match="conv1/kernel: coded with shape"):
        coding.complete(coded, model)
    with pytest.raises(ValueError, match="file's tree"):
        coding.restore(model, {"conv1": {"kernel": np.ones((3, 3, 3, 16), "f4")}})
