"""Index sets: partition, round trips, strides, N:M, the thin matrix product."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from cnnjax import pruning
from cnnjax.pruning import granularity

SHAPE = (3, 2, 4, 5)
BRUTE = {
    "weight": lambda h, w, c, o: (h, w, c, o),
    "column": lambda h, w, c, o: (h, w, c),
    "kernel": lambda h, w, c, o: (c, o),
    "channel": lambda h, w, c, o: (c,),
    "filter": lambda h, w, c, o: (o,),
    "layer": lambda h, w, c, o: (),
}


def _members(name: str) -> dict[tuple, list[tuple]]:
    out: dict[tuple, list[tuple]] = {}
    for index in np.ndindex(*SHAPE):
        out.setdefault(BRUTE[name](*index), []).append(index)
    return out


@pytest.mark.method("pruning_granularity")
@pytest.mark.parametrize("name", pruning.GRANULARITIES)
def test_ids_partition_the_tensor_into_the_index_sets(name):
    ids = np.asarray(pruning.groups({"kernel": np.zeros(SHAPE, np.float32)}, name)["kernel"])
    members = _members(name)
    assert ids.shape == SHAPE
    assert ids.dtype == np.int32
    assert sorted(np.unique(ids)) == list(range(len(members)))
    for number, key in enumerate(sorted(members)):
        assert {tuple(i) for i in np.argwhere(ids == number)} == set(members[key])


@pytest.mark.method("pruning_granularity")
@pytest.mark.parametrize("name", pruning.GRANULARITIES)
@pytest.mark.parametrize("op", ["mean", "sum", "max", "l2"])
def test_reduce_equals_brute_force_and_expand_round_trips(name, op):
    scores = np.random.default_rng(0).random(SHAPE).astype(np.float32)
    reduced = np.asarray(pruning.reduce({"k": scores}, name, op)["k"])
    assert reduced.shape == granularity.group_shape(SHAPE, name)
    fn = {
        "mean": np.mean,
        "sum": np.sum,
        "max": np.max,
        "l2": lambda v: np.sqrt(np.sum(np.square(v))),
    }[op]
    members = _members(name)
    expected = [fn([scores[i] for i in members[key]]) for key in sorted(members)]
    np.testing.assert_allclose(reduced.ravel(), expected, rtol=1e-5)
    # expand(reduce(expand(m))) is expand(m), and a group mask survives the trip
    group = reduced > np.median(reduced)
    wide = pruning.expand({"k": group}, {"k": scores})["k"]
    back = pruning.reduce({"k": np.asarray(wide, np.float32)}, name, "max")["k"] > 0
    np.testing.assert_array_equal(np.asarray(back), group)


@pytest.mark.method("pruning_granularity")
def test_dense_kernels_and_biases():
    assert granularity.group_shape((6, 3), "kernel") == (6, 3)
    assert granularity.group_shape((6, 3), "feature_map") == (1, 3)
    assert granularity.group_shape((6, 3), "channel") == (6, 1)
    assert granularity.group_shape((3,), "filter") == (3,)
    assert granularity.group_shape((3,), "layer") == (1,)


@pytest.mark.method("pruning_granularity")
def test_strided_keeps_thirteen_of_a_five_by_five():
    kept = pruning.strided_positions((5, 5), 2, 0)
    assert kept.sum() == 13
    assert list(np.flatnonzero(kept)) == list(range(0, 25, 2))
    assert list(np.flatnonzero(pruning.strided_positions((3, 3), 4, 1))) == [1, 5]


@pytest.mark.method("pruning_granularity")
def test_strided_mask_per_map_and_per_kernel():
    stride, offset = np.array([2, 3, 1]), np.array([1, 2, 0])
    mask = np.asarray(pruning.strided_mask((5, 5, 3, 4), stride, offset))
    for c, o in itertools.product(range(3), range(4)):
        expected = pruning.strided_positions((5, 5), int(stride[c]), int(offset[c]))
        np.testing.assert_array_equal(mask[:, :, c, o], expected)
    each = np.arange(12).reshape(3, 4) % 2 + 1
    mask = np.asarray(pruning.strided_mask((5, 5, 3, 4), each))
    for c, o in itertools.product(range(3), range(4)):
        expected = pruning.strided_positions((5, 5), int(each[c, o]))
        np.testing.assert_array_equal(mask[:, :, c, o], expected)


@pytest.mark.method("pruning_granularity")
def test_shared_strides_make_the_im2col_product_thin():
    rng = np.random.default_rng(1)
    image, kernel = rng.normal(size=(7, 8, 3)), rng.normal(size=(3, 3, 3, 4))
    mask = np.asarray(pruning.strided_mask(kernel.shape, np.array([2, 3, 2]), np.array([0, 1, 1])))
    patches = np.stack([image[i : i + 3, j : j + 3].ravel() for i in range(5) for j in range(6)])
    full = patches @ (kernel * mask).reshape(-1, 4)
    columns = pruning.kept_columns(mask)
    thin = patches[:, columns] @ kernel.reshape(-1, 4)[columns]
    assert len(columns) == 5 + 3 + 4
    np.testing.assert_allclose(thin, full, atol=1e-12, rtol=0)


@pytest.mark.method("pruning_granularity")
def test_removed_fractions_of_maps_multiply_in_the_next_layer():
    # keeping (1 - p) maps of layer l and (1 - q) of l + 1 keeps (1 - p)(1 - q) of the second
    one, two = np.ones((3, 3, 2, 8), bool), np.ones((3, 3, 8, 12), bool)
    one[..., :2] = False
    two[..., :3] = False
    two[:, :, :2] = False
    assert one.mean() == 0.75
    assert two.mean() == 0.75 * 0.75
    coarse = pruning.expand({"k": one.any((0, 1, 2), keepdims=True)}, {"k": one})["k"]
    np.testing.assert_array_equal(np.asarray(coarse), one)


@pytest.mark.method("pruning_granularity")
def test_coarse_and_fine_masks_multiply():
    rng = np.random.default_rng(2)
    shape = (5, 5, 8, 10)
    fine = np.asarray(pruning.strided_mask(shape, 2))
    kernels = np.zeros((1, 1, 8, 10), bool)
    kernels.ravel()[rng.permutation(80)[:30]] = True
    coarse = pruning.expand({"k": kernels}, {"k": np.zeros(shape)})
    both = pruning.intersect(coarse, {"k": fine})
    assert np.isclose(pruning.density(both)[""], 30 / 80 * 13 / 25)


@pytest.mark.method("pruning_granularity")
@pytest.mark.parametrize("axis", [-2, -1, "reduction"])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 4), (1, 2)])
def test_n_m_is_the_best_of_every_block(n, m, axis):
    scores = np.random.default_rng(3).integers(0, 5, (3, 4, 8, 4)).astype(np.float32)
    mask = np.asarray(pruning.n_m_mask({"k": scores}, n, m, axis=axis)["k"])
    flat, kept = (
        (np.moveaxis(a.reshape(-1, 4) if axis == "reduction" else a, -2 if axis != -1 else -1, -1))
        for a in (scores, mask)
    )
    flat, kept = flat.reshape(-1, m), kept.reshape(-1, m)
    assert (kept.sum(1) == n).all()
    for row, choice in zip(flat, kept):
        best = max(row[list(c)].sum() for c in itertools.combinations(range(m), n))
        assert row[choice].sum() == best
        # the lower index of equal scores
        assert list(np.flatnonzero(choice)) == sorted(np.argsort(-row, kind="stable")[:n])


def test_bad_granularity_input():
    with pytest.raises(ValueError, match="Did you mean 'filter'"):
        pruning.groups({"k": np.zeros((2, 2))}, "filtre")
    with pytest.raises(ValueError, match="unknown reduction 'men'"):
        pruning.reduce({"k": np.zeros((2, 2))}, "filter", "men")
    with pytest.raises(ValueError, match=r"offset must lie in \[0, stride\)"):
        pruning.strided_positions((3, 3), 2, 2)
    with pytest.raises(ValueError, match="stride must be at least 1"):
        pruning.strided_mask((3, 3, 2, 2), 0)
    with pytest.raises(ValueError, match="expected a number"):
        pruning.strided_mask((3, 3, 2, 4), np.array([1, 1, 1]))
    with pytest.raises(ValueError, match="no spatial axes"):
        pruning.strided_mask((2, 4), 2)
    with pytest.raises(ValueError, match=r"4 does not divide .* a/kernel \(3\)"):
        pruning.n_m_mask({"a": {"kernel": np.zeros((3, 3, 3, 8))}})
    with pytest.raises(ValueError, match="0 < n <= m"):
        pruning.n_m_mask({"k": np.zeros((4, 4))}, 5, 4)
    with pytest.raises(ValueError, match="group mask of k"):
        pruning.expand({"k": np.ones((3, 1))}, {"k": np.ones((4, 2))})
