"""Chains at full rank equal the convolution, for every geometry; costs equal a brute count."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import factorization as f
from cnnjax.factorization.chain import ConvSpec

GEOMETRIES = [
    ConvSpec((1, 1), "SAME"),
    ConvSpec((2, 2), "SAME"),
    ConvSpec((3, 2), "VALID"),
    ConvSpec((2, 1), ((1, 2), (0, 1))),
    ConvSpec((1, 1), "SAME", (2, 2)),
    ConvSpec((2, 2), ((2, 1), (1, 3)), (2, 1)),
]


def data(kh, kw, i, o, seed=0, size=(9, 8)):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(2, *size, i)), rng.normal(size=(kh, kw, i, o)), rng.normal(size=o)


def naive_conv(x, kernel, spec):
    """Convolution by loops over taps, padding by hand, in NumPy float64."""
    kh, kw, i, o = kernel.shape
    pads = []
    for axis, k in ((0, kh), (1, kw)):
        n, s, d = x.shape[1 + axis], spec.strides[axis], spec.dilation[axis]
        reach = (k - 1) * d + 1
        if spec.padding == "SAME":
            total = max((-(-n // s) - 1) * s + reach - n, 0)
            pads.append((total // 2, total - total // 2))
        elif spec.padding == "VALID":
            pads.append((0, 0))
        else:
            pads.append(spec.padding[axis])
    x = np.pad(x, [(0, 0), *pads, (0, 0)])
    height = (x.shape[1] - (kh - 1) * spec.dilation[0] - 1) // spec.strides[0] + 1
    width = (x.shape[2] - (kw - 1) * spec.dilation[1] - 1) // spec.strides[1] + 1
    out = np.zeros((x.shape[0], height, width, o))
    for a, b in itertools.product(range(kh), range(kw)):
        top, left = a * spec.dilation[0], b * spec.dilation[1]
        window = x[
            :,
            top : top + (height - 1) * spec.strides[0] + 1 : spec.strides[0],
            left : left + (width - 1) * spec.strides[1] + 1 : spec.strides[1],
        ]
        out += window @ kernel[a, b]
    return out


def chains(kernel, spec, bias):
    """Every chain at full rank."""
    kh, kw, i, o = kernel.shape
    full = min(kh * kw * i, o)
    yield "basis", f.basis_chain(*f.filter_basis(kernel, full), spec, bias)
    dual = f.dual_filter_basis(kernel, min(i, kh * kw * o))
    yield "dual", f.dual_basis_chain(*dual, spec, bias)
    pair = f.spatial_svd(kernel, min(kh * i, kw * o))
    yield "spatial", f.spatial_chain(*pair, spec, bias)
    t = f.tucker2(kernel, i, o)
    stages = (t.first[None, None], t.core, t.last.T[None, None])
    yield "tucker2", f.tucker2_chain(*stages, spec, bias)
    scheme = f.jaderberg_scheme1(jax.random.key(0), kernel, kh * kw)
    yield "scheme1", f.scheme1_chain(*scheme, spec, bias)


@pytest.mark.method("chain_apply")
@pytest.mark.parametrize("spec", GEOMETRIES, ids=range(len(GEOMETRIES)))
def test_full_rank_chains_are_exact(spec):
    x, kernel, bias = data(3, 3, 4, 5)
    expected = naive_conv(x, kernel, spec) + bias
    with jax.enable_x64(True):
        for name, chain in chains(kernel, spec, bias):
            got = np.asarray(f.chain_apply(chain, x))
            np.testing.assert_allclose(got, expected, atol=1e-10, err_msg=name)


@pytest.mark.method("chain_apply")
def test_full_rank_chains_in_float32():
    x, kernel, bias = (a.astype(np.float32) for a in data(3, 5, 6, 4))
    spec = ConvSpec((2, 1), "SAME")
    expected = naive_conv(x.astype(float), kernel.astype(float), spec) + bias
    for name, chain in chains(kernel, spec, bias):
        got = f.chain_apply(chain, x)
        relative = np.abs(got - expected).max() / np.abs(expected).max()
        assert relative < 1e-5, name


@pytest.mark.method("cp4_conv")
@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (2, 1)])
def test_cp_chains_equal_their_composed_kernel(strides):
    rng = np.random.default_rng(0)
    factors = [rng.normal(size=(n, 7)) for n in (3, 5, 4, 6)]
    x = rng.normal(size=(2, 9, 8, 4))
    spec = ConvSpec(strides, "SAME")
    with jax.enable_x64(True):
        kernel = np.einsum("ar,br,ir,or->abio", *factors)
        expected = naive_conv(x, kernel, spec)
        got = np.asarray(f.chain_apply(f.cp4_chain(factors, spec), x))
        np.testing.assert_allclose(got, expected, atol=1e-9)
        merged = np.einsum("ar,br->abr", *factors[:2]).reshape(15, 7)
        three = f.cp3_chain([merged, *factors[2:]], (3, 5), spec)
        np.testing.assert_allclose(np.asarray(f.chain_apply(three, x)), expected, atol=1e-9)


@pytest.mark.method("conv_cost")
def test_costs_equal_a_brute_count():
    spec = ConvSpec((2, 1), ((1, 2), (0, 1)), (2, 1), groups=2)
    kernel = np.ones((3, 3, 2, 6), np.float32)
    x = np.ones((1, 9, 8, 4), np.float32)
    out = f.convolve(x, kernel, spec)
    count = out.shape[1] * out.shape[2] * 3 * 3 * 2 * 6
    assert f.conv_cost(kernel.shape, spec, (9, 8), bias=True) == (kernel.size + 6, count)
    # the compiler's count, two operations each; it leaves out what meets the padding
    valid = ConvSpec((2, 1), "VALID", (2, 1), groups=2)
    compiled = jax.jit(lambda x: f.convolve(x, kernel, valid)).lower(x).compile()
    (_, macs) = f.conv_cost(kernel.shape, valid, (9, 8))
    assert compiled.cost_analysis()["flops"] == 2 * macs
    rng = np.random.default_rng(0)
    chain = f.cp4_chain([rng.normal(size=(n, 7)) for n in (3, 5, 4, 6)], ConvSpec((2, 2)))
    # 1x1 at input resolution, then the halves, the last at output resolution
    assert chain.macs(9, 8) == 72 * 4 * 7 + 5 * 8 * 3 * 7 + 5 * 4 * 5 * 7 + 20 * 7 * 6
    assert chain.params == 7 * (3 + 5 + 4 + 6)


@pytest.mark.method("chain_apply")
def test_groups_split_and_join():
    kernel = np.random.default_rng(0).normal(size=(3, 3, 2, 6)).astype(np.float32)
    blocks = f.split_groups(kernel, 3)
    assert blocks.shape == (3, 3, 3, 2, 2)
    np.testing.assert_array_equal(blocks[1], kernel[..., 2:4])
    np.testing.assert_array_equal(f.join_groups(blocks), kernel)
    with pytest.raises(ValueError, match="4 groups"):
        f.split_groups(kernel, 4)


@pytest.mark.method("chain_apply")
def test_a_chain_is_a_pytree_under_jit_and_grad():
    x, kernel, bias = (jnp.asarray(a, jnp.float32) for a in data(3, 3, 4, 5))
    chain = f.basis_chain(*f.filter_basis(kernel, 3), ConvSpec(), bias)
    gradient = jax.grad(lambda c: jnp.sum(f.chain_apply(c, x) ** 2))(chain)
    assert gradient.specs == chain.specs
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
