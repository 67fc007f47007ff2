"""Selection by score and magnitude: exact counts, ties, scopes, exemptions, errors."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from cnnjax import pruning, tree


def make_params(seed: int = 0):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    return {
        "conv": {"kernel": draw(3, 3, 2, 4), "bias": draw(4)},
        "bn": {"scale": draw(4), "bias": draw(4)},
        "fc": {"kernel": 0.3 * draw(16, 5), "bias": draw(5)},
    }


KERNELS = ("conv/kernel", "fc/kernel")


def removed(mask) -> int:
    return sum(int((~np.asarray(m)).sum()) for m in jax.tree.leaves(mask))


@pytest.mark.method("magnitude_prune_retrain")
@pytest.mark.parametrize("sparsity", [0.0, 0.07, 0.5, 0.9, 0.97])
def test_global_cut_equals_sorting_the_concatenation(sparsity):
    params = make_params()
    mask = pruning.magnitude_mask(params, sparsity, allow_empty=True)
    flat = tree.flatten(params)
    joined = np.concatenate([np.abs(flat[p]).ravel() for p in KERNELS])
    count = pruning.prune_count(sparsity, joined.size)
    gone = np.argsort(joined, kind="stable")[:count]
    expected = np.ones(joined.size, bool)
    expected[gone] = False
    got = np.concatenate([np.asarray(tree.flatten(mask)[p]).ravel() for p in KERNELS])
    np.testing.assert_array_equal(got, expected)
    assert removed(mask) == count
    for path, leaf in tree.flatten(mask).items():
        if path not in KERNELS:
            assert np.asarray(leaf).all(), path


@pytest.mark.method("magnitude_prune_retrain")
def test_layer_scope_removes_the_ceiling_of_each_layer():
    params = make_params()
    mask = tree.flatten(pruning.magnitude_mask(params, 0.7, scope="layer"))
    for path, leaf in tree.flatten(params).items():
        if path in KERNELS:
            count = -(-7 * leaf.size // 10)
            assert (~np.asarray(mask[path])).sum() == count
            cut = np.sort(np.abs(leaf).ravel())[count - 1]
            np.testing.assert_array_equal(np.asarray(mask[path]), np.abs(leaf) > cut)


@pytest.mark.method("magnitude_prune_retrain")
@pytest.mark.parametrize("granularity", ["weight", "kernel", "filter"])
def test_mask_is_monotone_in_the_sparsity(granularity):
    params, previous = make_params(1), None
    for sparsity in (0.0, 0.2, 0.25, 0.5, 0.74):
        mask = pruning.magnitude_mask(params, sparsity, granularity=granularity, allow_empty=True)
        if previous is not None:
            jax.tree.map(
                lambda new, old: np.testing.assert_array_less(new, old + 1), mask, previous
            )
            assert all(
                not np.any(np.asarray(n) & ~np.asarray(o))
                for n, o in zip(jax.tree.leaves(mask), jax.tree.leaves(previous))
            )
        previous = mask


@given(
    values=st.lists(
        st.sampled_from([-1.5, -1.0, -0.0, 0.0, 0.5, 2.0, np.inf]), min_size=6, max_size=6
    ),
    split=st.integers(1, 5),
    count=st.integers(0, 6),
)
@settings(max_examples=60, deadline=None)
def test_exact_selection_with_ties_signs_and_infinities(values, split, count):
    scores = np.array(values, np.float32)
    # padded to fixed shapes, so that one compilation serves every split
    pad = np.full(6, np.inf, np.float32)
    first, second = pad.copy(), pad.copy()
    first[:split], second[: 6 - split] = scores[:split], scores[split:]
    finite = np.isfinite(scores).sum()
    count = min(count, int(finite))
    keep = _jitted(first, second, jnp.array([count]))
    got = np.concatenate([np.asarray(keep[0])[:split], np.asarray(keep[1])[: 6 - split]])
    # of equal scores the lower index stays: sort by score, then by descending index
    order = np.lexsort((-np.arange(6), scores))
    expected = np.ones(6, bool)
    expected[order[:count]] = False
    np.testing.assert_array_equal(got, expected)


@jax.jit
def _jitted(first, second, count):
    return pruning.prune_smallest([first, second], count, (0, 0))


def test_float16_bfloat16_and_integer_scores():
    values = np.array([3.0, -2.0, 0.0, 7.0, -9.0])
    for dtype in (jnp.float16, jnp.bfloat16, jnp.int32):
        (keep,) = pruning.prune_smallest([jnp.asarray(values, dtype)], jnp.array([2]), (0,))
        assert list(np.asarray(keep)) == [True, False, True, True, False]


def test_float64_scores_are_not_rounded():
    with jax.enable_x64(True):
        close = jnp.asarray([1.0 + 2e-16, 1.0, 1.0 + 4e-16, 2.0], jnp.float64)
        (keep,) = pruning.prune_smallest([close], jnp.array([2]), (0,))
    assert list(np.asarray(keep)) == [False, False, True, True]


def test_counts_are_those_of_the_decimal_number():
    assert pruning.prune_count(0.07, 100) == 7  # 0.07 * 100 is 7.000000000000001
    assert pruning.prune_count(0.9, 266_200) == 239_580
    assert pruning.prune_count(1e-5, 10) == 1
    assert pruning.prune_count(0.0, 10) == 0


@pytest.mark.method("pruning_granularity")
@pytest.mark.parametrize("granularity", ["kernel", "filter", "channel", "column", "layer"])
def test_groups_leave_whole(granularity):
    params = make_params(2)
    mask = pruning.magnitude_mask(
        params, 0.5, granularity=granularity, scope="global", allow_empty=True
    )
    scores = {}
    for path in KERNELS:
        leaf, ids = (
            tree.flatten(params)[path],
            tree.flatten(pruning.groups(params, granularity))[path],
        )
        for i in np.unique(ids):
            scores[path, int(i)] = np.abs(leaf[np.asarray(ids) == i]).mean()
    gone = sorted(scores, key=scores.__getitem__)[: pruning.prune_count(0.5, len(scores))]
    for path in KERNELS:
        ids = np.asarray(tree.flatten(pruning.groups(params, granularity))[path])
        lost = [i for p, i in gone if p == path]
        np.testing.assert_array_equal(np.asarray(tree.flatten(mask)[path]), ~np.isin(ids, lost))


@pytest.mark.method("pruning_granularity")
def test_a_filter_goes_with_its_bias():
    params = make_params(3)
    mask = pruning.magnitude_mask(params, 0.5, granularity="feature_map", scope="layer")
    kept = np.asarray(mask["conv"]["kernel"]).any((0, 1, 2))
    assert kept.sum() == 2
    np.testing.assert_array_equal(np.asarray(mask["conv"]["bias"]), kept)
    assert np.asarray(mask["bn"]["scale"]).all()
    alone = pruning.magnitude_mask(
        params, 0.5, granularity="feature_map", scope="layer", bias=False
    )
    assert np.asarray(alone["conv"]["bias"]).all()


def test_sparsity_per_glob_and_exclusion():
    params = make_params()
    mask = pruning.density(pruning.magnitude_mask(params, {"fc/*": 0.75}))
    assert mask["fc/kernel"] == 0.25
    assert mask["conv/kernel"] == 1.0
    both = pruning.density(pruning.magnitude_mask(params, {"conv/*": 0.5, "**": 0.25}))
    assert (both["conv/kernel"], both["fc/kernel"]) == (0.5, 0.75)
    without = pruning.density(pruning.magnitude_mask(params, 0.5, exclude="conv/**"))
    assert (without["conv/kernel"], without["fc/kernel"]) == (1.0, 0.5)


def test_an_earlier_mask_stays_removed_and_counts():
    params = make_params()
    flat = tree.flatten(params)
    first = pruning.magnitude_mask(params, 0.3)
    # what was removed grows back in magnitude: it must stay out all the same
    grown = jax.tree.map(lambda w, m: np.where(m, w, 100.0).astype(np.float32), params, first)
    second = pruning.magnitude_mask(grown, 0.6, mask=first)
    total = sum(flat[p].size for p in KERNELS)
    assert removed(second) == pruning.prune_count(0.6, total)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second)):
        assert not np.any(np.asarray(b) & ~np.asarray(a))


def test_mask_algebra():
    params = make_params()
    a = pruning.magnitude_mask(params, 0.4)
    b = pruning.magnitude_mask(make_params(9), 0.4)
    once = pruning.apply_mask(params, a)
    jax.tree.map(np.testing.assert_array_equal, pruning.apply_mask(once, a), once)
    composed = pruning.apply_mask(once, b)
    product = pruning.apply_mask(params, pruning.intersect(a, b))
    jax.tree.map(np.testing.assert_array_equal, composed, product)
    assert tree.nonzeros(once) == tree.count(params) - removed(a)
    np.testing.assert_array_equal(once["bn"]["scale"], params["bn"]["scale"])
    jax.tree.map(np.testing.assert_array_equal, pruning.mask_of(once), a)


def test_apply_mask_leaves_plus_zero_even_of_nan():
    out = pruning.apply_mask(
        {"k": np.array([np.nan, -3.0, 1.0], np.float32)}, {"k": np.array([False, False, True])}
    )["k"]
    assert np.asarray(out).tobytes() == np.array([0.0, 0.0, 1.0], np.float32).tobytes()


def test_any_flax_tree():
    model = nnx.Linear(6, 4, rngs=nnx.Rngs(0), kernel_init=nnx.initializers.ones)
    state = nnx.state(model, nnx.Param)
    mask = pruning.magnitude_mask(state, 0.5)
    assert jax.tree.structure(mask) == jax.tree.structure(state)
    masked = pruning.apply_mask(state, mask)
    assert tree.nonzeros(masked) == 12
    # a plain dict masks a State too
    plain = nnx.to_pure_dict(mask)
    again = pruning.apply_mask(state, plain)
    jax.tree.map(np.testing.assert_array_equal, again, masked)


@pytest.mark.method("magnitude_prune_retrain")
def test_threshold_is_a_quality_times_the_deviation():
    params = make_params()
    mask = tree.flatten(pruning.threshold_mask(params, {"conv/*": 0.5, "fc/*": 1.2}))
    for path, q in (("conv/kernel", 0.5), ("fc/kernel", 1.2)):
        w = tree.flatten(params)[path].astype(np.float64)
        np.testing.assert_array_equal(np.asarray(mask[path]), np.abs(w) >= q * w.std())
    # with a mask, the deviation is that of the survivors
    old = pruning.magnitude_mask(params, 0.5, scope="layer")
    mask = tree.flatten(pruning.threshold_mask(params, 1.0, mask=old))
    for path in KERNELS:
        w, m = tree.flatten(params)[path].astype(np.float64), np.asarray(tree.flatten(old)[path])
        np.testing.assert_array_equal(np.asarray(mask[path]), m & (np.abs(w) >= w[m].std()))


@pytest.mark.method("magnitude_prune_retrain")
def test_prune_retrain_cuts_in_steps_and_keeps_zeros():
    params = make_params()
    seen = []

    def retrain(p, mask, step):
        seen.append(pruning.density(mask)["fc/kernel"])
        assert tree.nonzeros(p["fc"]) == round(80 * seen[-1]) + 5
        return jax.tree.map(lambda w: w + 0.01, p)  # puts back what was removed

    out, mask = pruning.prune_retrain(params, [0.5, 0.75, 0.9], retrain, scope="layer")
    assert seen == [0.5, 0.25, 0.1]
    for w, m in zip(jax.tree.leaves(out), jax.tree.leaves(mask)):
        assert np.all(np.asarray(w)[~np.asarray(m)] == 0)


def test_bad_input_is_named():
    params = make_params()
    with pytest.raises(ValueError, match=r"sparsity must lie in \[0, 1\), got 1.2"):
        pruning.magnitude_mask(params, 1.2)
    with pytest.raises(ValueError, match=r"sparsity of 'fc/\*' must lie"):
        pruning.magnitude_mask(params, {"fc/*": -0.1})
    with pytest.raises(ValueError, match=r"'fc/kernell' matches nothing. Did you mean 'fc/kernel'"):
        pruning.magnitude_mask(params, {"fc/kernell": 0.5})
    with pytest.raises(ValueError, match="exclude pattern 'cnv/kernel' matches nothing"):
        pruning.magnitude_mask(params, 0.5, exclude="cnv/kernel")
    with pytest.raises(ValueError, match="nothing to prune"):
        pruning.magnitude_mask(params, 0.5, include="bn/*")
    with pytest.raises(ValueError, match="scope must be one of"):
        pruning.magnitude_mask(params, 0.5, scope="locale")
    with pytest.raises(ValueError, match="needs scope='layer'"):
        pruning.magnitude_mask(params, {"fc/*": 0.5}, scope="global")
    small = {**params, "fc": {"kernel": params["fc"]["kernel"] * 1e-6}}
    with pytest.raises(ValueError, match="would empty fc/kernel"):
        pruning.magnitude_mask(small, 0.6)
    with pytest.raises(ValueError, match="NaN among the scores of fc/kernel"):
        pruning.magnitude_mask({**params, "fc": {"kernel": np.full((2, 2), np.nan)}}, 0.5)
    with pytest.raises(ValueError, match=r"mask does not match .* missing: bn/bias"):
        pruning.apply_mask(params, {"conv": params["conv"], "fc": params["fc"]})
    wrong = jax.tree.map(lambda w: w > 0, params)
    wrong["fc"]["kernel"] = wrong["fc"]["kernel"].T
    with pytest.raises(ValueError, match=r"shape of fc/kernel: \(5, 16\)"):
        pruning.apply_mask(params, wrong)
    with pytest.raises(ValueError, match=r"quality of .* must be >= 0, got -1"):
        pruning.threshold_mask(params, -1.0)
    with pytest.raises(ValueError, match=r"quality 50.0 would empty conv/kernel"):
        pruning.threshold_mask(params, 50.0)
    with pytest.raises(ValueError, match="must not decrease"):
        pruning.prune_retrain(params, [0.5, 0.4], lambda p, m, i: p)
    with pytest.raises(ValueError, match="the mask empties conv/kernel"):
        pruning.check_alive({"conv": {"kernel": np.zeros((2, 2), bool)}})


@pytest.mark.parametrize("shape", ["geometric", "linear", "cubic"])
def test_steps_end_exactly(shape):
    values = pruning.schedules.steps(0.9, 4, shape=shape)
    assert values[-1] == 0.9
    assert all(b > a for a, b in itertools.pairwise(values))
    if shape == "geometric":
        kept = 1 - np.array([0.0, *values])
        np.testing.assert_allclose(kept[1:] / kept[:-1], 0.1**0.25)
    if shape == "cubic":
        np.testing.assert_allclose(values, 0.9 - 0.9 * (1 - np.arange(1, 5) / 4) ** 3)


def test_bad_schedules():
    with pytest.raises(ValueError, match="final sparsity must lie"):
        pruning.schedules.steps(1.2, 3)
    with pytest.raises(ValueError, match="below the initial"):
        pruning.schedules.steps(0.2, 3, initial=0.5)
    with pytest.raises(ValueError, match=r"unknown shape 'cubik'. Did you mean 'cubic'"):
        pruning.schedules.steps(0.5, 3, shape="cubik")
    with pytest.raises(ValueError, match="begin must be before end"):
        pruning.schedules.cubic(1, begin=3, end=3, final=0.5)
