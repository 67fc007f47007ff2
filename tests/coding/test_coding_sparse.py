"""CSR and CSC: exact round trips, products, counts (oracles: scipy.sparse and dense numpy)."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cnnjax.coding import sparse

pytestmark = pytest.mark.method("sparse_storage")


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def sparse_matrix(rng, shape, density, dtype=np.float32):
    return np.where(rng.random(shape) < density, rng.normal(size=shape), 0).astype(dtype)


MATRICES = {
    "zero": np.zeros((4, 3), np.float32),
    "full": np.arange(1, 13, dtype=np.float32).reshape(4, 3),
    "empty_rows": np.array([[0, 0, 0], [1, 0, 2], [0, 0, 0], [0, 3, 0]], np.float32),
    "one": np.array([[5.0]], np.float32),
    "no_rows": np.zeros((0, 3), np.float32),
    "no_columns": np.zeros((3, 0), np.float32),
    "special": np.array([[0.0, -0.0, np.nan], [np.inf, 0, -np.inf]], np.float32),
    "ints": np.array([[0, 3], [-1, 0]], np.int8),
}


@pytest.mark.parametrize("order", ["row", "column"])
@pytest.mark.parametrize("name", MATRICES)
def test_round_trip_is_bit_exact(name, order):
    matrix = MATRICES[name]
    stored = sparse.encode(matrix, order=order)
    assert same_bits(sparse.decode(stored), matrix)
    ptr = np.asarray(stored.ptr)
    assert (np.diff(ptr) >= 0).all()
    assert ptr[0] == 0
    assert ptr[-1] == stored.nse
    n = matrix.shape[0] if order == "row" else matrix.shape[1]
    assert stored.numbers == 2 * stored.nse + n + 1


@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=9),
        elements=st.one_of(st.just(0.0), st.floats(width=32)),
    ),
    st.sampled_from(["row", "column"]),
)
@settings(max_examples=60, deadline=None)
def test_random_round_trips(matrix, order):
    assert same_bits(sparse.decode(sparse.encode(matrix, order=order)), matrix)


def test_structure_equals_scipys():
    matrix = sparse_matrix(np.random.default_rng(0), (17, 11), 0.3)
    for order, peer in (("row", scipy.sparse.csr_array), ("column", scipy.sparse.csc_array)):
        ours, theirs = sparse.encode(matrix, order=order), peer(matrix)
        np.testing.assert_array_equal(ours.ptr, theirs.indptr)
        np.testing.assert_array_equal(ours.index, theirs.indices)
        np.testing.assert_array_equal(ours.values, theirs.data)


def test_negative_zero_is_stored_unless_dropped():
    matrix = np.array([[0.0, -0.0, 1.0]], np.float32)
    assert sparse.encode(matrix).nse == 2
    assert sparse.encode(sparse.drop_negative_zeros(matrix)).nse == 1


@pytest.mark.parametrize("order", ["row", "column"])
@pytest.mark.parametrize("density", [0.0, 0.2])
def test_products_equal_dense(order, density):
    rng = np.random.default_rng(1)
    matrix = sparse_matrix(rng, (13, 9), density)
    stored = jax.device_put(sparse.encode(matrix, order=order))
    vector = rng.normal(size=9).astype(np.float32)
    many = rng.normal(size=(9, 5)).astype(np.float32)
    np.testing.assert_allclose(sparse.matvec(stored, vector), matrix @ vector, atol=1e-5)
    np.testing.assert_allclose(sparse.matmul(stored, many), matrix @ many, atol=1e-5)
    jitted = jax.jit(sparse.matvec)(stored, vector)
    np.testing.assert_allclose(jitted, matrix @ vector, atol=1e-5)


def test_kernels_are_lowered():
    kernel = sparse_matrix(np.random.default_rng(2), (3, 3, 4, 5), 0.2)
    stored = sparse.encode(kernel)
    assert stored.shape == (36, 5)
    np.testing.assert_array_equal(sparse.decode(stored).reshape(kernel.shape), kernel)


def test_bytes_and_break_even():
    assert sparse.nbytes((10, 8), 7) == (7 * 64 + 11 * 32) // 8
    assert sparse.nbytes((10, 8), 7, order="column", index_bits=16) == (7 * 48 + 9 * 32) // 8
    assert sparse.break_even_density((2000, 2000)) == pytest.approx(0.50, abs=0.002)
    assert sparse.break_even_density((2000, 2000), index_bits=16) == pytest.approx(0.667, abs=0.002)
    # at the break-even density the two sizes agree
    density = sparse.break_even_density((50, 40))
    nse = round(density * 2000)
    assert sparse.nbytes((50, 40), nse) == pytest.approx(4 * 2000, abs=8)


def test_bad_input():
    stored = sparse.encode(np.eye(3, dtype=np.float32))
    with pytest.raises(ValueError, match="order"):
        sparse.encode(np.eye(3), order="rows")
    with pytest.raises(ValueError, match="shape"):
        sparse.matvec(stored, np.ones(4, np.float32))
    with pytest.raises(ValueError, match="vector"):
        sparse.matvec(stored, np.ones((3, 1), np.float32))
    broken = sparse.Compressed(stored.values, stored.index, stored.ptr[::-1], (3, 3))
    with pytest.raises(ValueError, match="pointers"):
        sparse.decode(broken)
    outside = sparse.Compressed(stored.values, stored.index + 1, stored.ptr, (3, 3))
    with pytest.raises(ValueError, match="outside"):
        sparse.decode(outside)
    with pytest.raises(ValueError, match="scalar"):
        sparse.encode(np.float32(1))
