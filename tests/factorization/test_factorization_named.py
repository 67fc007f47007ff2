"""Rules by name: every method reaches `factorize`, exact at full rank; words for ranks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cnnjax import factorization as f
from cnnjax import surgery

pytestmark = pytest.mark.usefixtures("numpy_kernels")
EXAMPLE = jax.ShapeDtypeStruct((1, 7, 6, 4), jnp.float32)


class One(nnx.Module):
    """A network of one strided, grouped convolution with an uneven padding."""

    def __init__(self, groups=1):
        self.conv = nnx.Conv(
            4, 6, (3, 2), (2, 1), padding=((1, 2), (0, 1)),
            feature_group_count=groups, rngs=nnx.Rngs(0),
        )  # fmt: skip
        self.conv.bias[...] = jnp.arange(6.0)

    def __call__(self, x):
        return self.conv(x)


def run(model):
    x = np.random.default_rng(0).standard_normal(EXAMPLE.shape).astype(np.float32)
    graphdef, state = nnx.split(model)
    return np.asarray(jax.jit(lambda s, x: nnx.merge(graphdef, s)(x))(state, x))


EXACT = ["basis", "dual_basis", "spatial_svd", "tucker2", "tensor_train", "jaderberg_scheme1"]
METHODS = {"tensor_train": "tensor_train", "jaderberg_scheme1": "jaderberg_scheme1"}


@pytest.mark.method("filter_basis")
@pytest.mark.method("spatial_svd")
@pytest.mark.method("jaderberg_scheme2")
@pytest.mark.parametrize("groups", [1, 2])
def test_full_rank_is_exact(groups):
    model = One(groups)
    expected = run(model)
    for name in EXACT if groups == 1 else EXACT[:-1]:
        small = f.factorize(model, f.make_rule(name, 1.0, always=True), EXAMPLE)
        assert isinstance(small.conv, nnx.Sequential), name
        np.testing.assert_allclose(run(small), expected, atol=1e-5, err_msg=name)


@pytest.mark.method("tucker2")
def test_truncated_trains_and_duals_keep_what_their_spectra_say():
    model = One()
    kernel = np.asarray(model.conv.kernel[...], np.float64)
    small = f.factorize(model, f.make_rule("dual_basis", 2, always=True), EXAMPLE)
    first, second = (np.asarray(p.kernel[...]) for p in small.conv.layers)
    error = np.linalg.norm(kernel - np.einsum("ir,abro->abio", first[0, 0], second))
    tail = np.linalg.svd(np.moveaxis(kernel, 2, 0).reshape(4, -1), compute_uv=False)[2:]
    np.testing.assert_allclose(error, np.linalg.norm(tail), rtol=1e-5)
    rule = f.make_rule("tensor_train", (3, 5, 4), always=True)
    small = f.factorize(model, rule, EXAMPLE)
    a, b, c, d = (np.asarray(p.kernel[...]) for p in small.conv.layers)
    again = np.einsum("ip,apq,bqr,ro->abio", a[0, 0], b[:, 0], c[0], d[0, 0])
    error = np.linalg.norm(kernel - again)
    tails = [
        np.linalg.norm(np.linalg.svd(m, compute_uv=False)[r:])
        for m, r in zip(rule.matrices(kernel), (3, 5, 4))
    ]
    assert max(tails) - 1e-6 <= error <= np.linalg.norm(tails) + 1e-6


def test_costs_of_the_stages_are_those_of_the_chains():
    model = One(2)
    for name, rank in (("dual_basis", 1), ("tensor_train", (1, 3, 2))):
        rule = f.make_rule(name, rank, always=True)
        (entry,) = f.plan(model, rule, EXAMPLE).layers
        small = f.factorize(model, rule, EXAMPLE)
        counted = sum(p.kernel[...].size for p in small.conv.layers)
        assert entry.params[1] == counted, name


def test_names_and_words():
    assert f.make_rule("cp_nls", 4).solver == "nls"
    assert f.make_rule("cp_tpm", "8", restarts=3) == f.CP(8, solver="tpm", restarts=3)
    assert f.make_rule("spatial", "energy 0.9") == f.Spatial(f.Energy(0.9))
    assert f.make_rule("tucker2", "macs 0.5") == f.Tucker2(f.MacsRatio(0.5))
    assert f.make_rule("tucker2", "evbmf 0.25") == f.Tucker2(f.EVBMF(0.25))
    assert f.make_rule("tucker2", ("evbmf", "0.5")) == f.Tucker2(("evbmf", 0.5))
    assert f.make_rule("basis") == f.Basis()
    with pytest.raises(ValueError, match="unknown rule 'tuker2'. Did you mean 'tucker2'"):
        f.make_rule("tuker2")
    with pytest.raises(ValueError, match="no option 'sweep'. Did you mean 'sweeps'"):
        f.make_rule("tucker2", sweep=3)
    with pytest.raises(ValueError, match="'solver'"):
        f.make_rule("cp_nls", solver="als")
    with pytest.raises(ValueError, match="Did you mean 'energy'"):
        f.make_rule("basis", "enery 0.9")
    with pytest.raises(ValueError, match="'macs NUMBER'"):
        f.make_rule("basis", "macs half")


@pytest.mark.method("evbmf_rank")
def test_weakened_evbmf_lies_between():
    rng = np.random.default_rng(0)
    low = rng.standard_normal((36, 3)) @ rng.standard_normal((3, 12))
    kernel = (low + 0.1 * rng.standard_normal((36, 12))).reshape(3, 3, 4, 12)
    model = nnx.Dict(conv=nnx.Conv(4, 12, (3, 3), rngs=nnx.Rngs(0)))
    model["conv"].kernel[...] = jnp.asarray(kernel, jnp.float32)

    def rank(word):
        return f.plan(model, f.make_rule("basis", word, always=True)).layers[0].ranks

    assert rank("evbmf") == (3,)
    assert rank("evbmf 0.5") == (3 + (12 - 3) // 2,)
    assert rank("evbmf 1.0") == (12,)
    with pytest.raises(ValueError, match="weaken is 1.5"):
        f.EVBMF(1.5)


def test_rank_bounds_are_named():
    model = One()
    for name, most in (("dual_basis", 4), ("spatial", 12), ("basis", 6), ("tensor_train", 4)):
        for rank in (0, 99):
            with pytest.raises(ValueError, match=f"rank is {rank}; expected 1 to {most}"):
                f.plan(model, f.make_rule(name, rank), EXAMPLE)
    assert surgery.modules(model)
