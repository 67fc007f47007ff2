"""Batch norm folding: exact outputs, which norms go, which networks are refused."""

from __future__ import annotations

import jax
import models_a_oracle as oracle
import numpy as np
import pytest
from flax import nnx

from cnnjax import models, tree
from cnnjax.models import blocks
from cnnjax.models.fold import Identity, fold_batchnorm

pytestmark = pytest.mark.method("bn_fold")

# name, fields, batch norms that must remain
CASES = [
    ("resnet50", {"stages": (1, 1), "width": 4, "num_classes": 5}, 32, 0),
    ("vgg16_cifar", {"stages": ((4, 4), (8,)), "hidden": 8}, 8, 0),
    # a unit's first norm reads a sum: only the stem's stays foldable
    ("preact_resnet164", {"stages": (2, 1), "widths": (8, 16), "stem_width": 4}, 8, 3),
    # of three layers and a tail; stem and bottleneck convolutions feed one norm each
    ("densenet_bc_100_12", {"stages": (2, 1), "growth": 2, "stem_width": 4}, 8, 5),
]


def run(model, x):
    graphdef, state = nnx.split(model)
    return jax.jit(lambda s, x: nnx.merge(graphdef, s)(x))(state, x)


@pytest.mark.parametrize(("name", "fields", "size", "left"), CASES, ids=[c[0] for c in CASES])
def test_folding_is_exact(name, fields, size, left):
    model = oracle.fill(models.create(name, rngs=nnx.Rngs(0), **fields))
    model.eval()
    before = tree.flatten(nnx.state(model))
    x = np.random.default_rng(1).standard_normal((2, size, size, 3)).astype(np.float32)
    folded = fold_batchnorm(model, jax.ShapeDtypeStruct(x.shape, x.dtype))
    a, b = np.asarray(run(model, x)), np.asarray(run(folded, x))
    np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5 * np.abs(a).max())
    norms = [m for _, m in nnx.iter_modules(folded) if isinstance(m, nnx.BatchNorm)]
    assert len(norms) == left
    gone = [m for _, m in nnx.iter_modules(folded) if isinstance(m, Identity)]
    assert gone
    # the argument is untouched
    assert tree.flatten(nnx.state(model)).keys() == before.keys()
    for path, leaf in tree.flatten(nnx.state(model)).items():
        np.testing.assert_array_equal(leaf, before[path])


class ReluBetween(nnx.Module):
    """conv - ReLU - batch norm: folding it would be wrong."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.bn = nnx.BatchNorm(4, rngs=rngs)
        self.fc = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.fc(self.bn(jax.nn.relu(self.conv(x))).mean((1, 2)))


def test_an_operation_between_layer_and_norm_is_noticed():
    model = oracle.fill(ReluBetween(nnx.Rngs(0)))
    x = np.random.default_rng(0).standard_normal((1, 6, 6, 3)).astype(np.float32)
    with pytest.raises(ValueError, match="give an example input"):
        fold_batchnorm(model)
    folded = fold_batchnorm(model, x)
    assert isinstance(folded.bn, nnx.BatchNorm)
    model.eval()
    np.testing.assert_array_equal(run(folded, x), run(model, x))


class Hidden(nnx.Module):
    """The same inside remat, where values can't be looked at."""

    def __init__(self, rngs):
        self.inner = ReluBetween(rngs)

    def __call__(self, x):
        return blocks.run(self.inner, x, remat=True)


def test_an_operation_that_cannot_be_seen_changes_the_output():
    model = oracle.fill(Hidden(nnx.Rngs(0)))
    with pytest.raises(ValueError, match="an operation sits between"):
        fold_batchnorm(model, np.zeros((1, 6, 6, 3), np.float32))
