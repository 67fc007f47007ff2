"""Paths, globs, selection and counting over every form of Flax tree."""

from __future__ import annotations

import fnmatch

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from hypothesis import given
from hypothesis import strategies as st

from cnnjax import tree


@pytest.fixture(scope="module")
def model():
    def make():
        rngs = nnx.Rngs(0)
        return nnx.Sequential(
            nnx.Conv(3, 4, (3, 3), rngs=rngs),
            nnx.BatchNorm(4, rngs=rngs),
            nnx.Sequential(nnx.Linear(4, 2, rngs=rngs)),
        )

    return nnx.eval_shape(make)


PATHS = [
    "layers/0/bias",
    "layers/0/kernel",
    "layers/1/bias",
    "layers/1/mean",
    "layers/1/scale",
    "layers/1/var",
    "layers/2/layers/0/bias",
    "layers/2/layers/0/kernel",
]


def test_paths_are_the_same_in_state_and_pure_dict(model):
    state = nnx.state(model)
    assert sorted(tree.flatten(state)) == PATHS
    assert sorted(tree.flatten(nnx.to_pure_dict(state))) == PATHS


def test_paths_of_a_linen_tree():
    variables = jax.eval_shape(
        lambda: linen.Dense(3).init(jax.random.key(0), jnp.zeros((1, 2)))  # pyright: ignore
    )
    assert sorted(tree.flatten(variables)) == ["params/bias", "params/kernel"]


def test_list_and_tuple_containers():
    assert list(tree.flatten({"a": [np.zeros(1), (np.zeros(2),)]})) == ["a/0", "a/1/0"]


def test_duplicate_path_is_an_error():
    with pytest.raises(ValueError, match="two leaves have the path 'a/b'"):
        tree.flatten({"a": {"b": np.zeros(1)}, "a/b": np.zeros(1)})


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("layer*/**/conv2", "layer1/0/conv2", True),
        ("layer*/**/conv2", "layer1/conv2", True),
        ("layer*/conv2", "layer1/0/conv2", False),
        ("**/kernel", "kernel", True),
        ("**/kernel", "a/b/kernel", True),
        ("*/kernel", "a/b/kernel", False),
        ("**", "a/b", True),
        ("a/**", "a/b/c", True),
        ("a/**", "b/a/c", False),
        ("conv[12]", "conv2", True),
        ("conv[12]", "conv3", False),
        ("conv?", "conv12", False),
        ("conv.x", "convAx", False),
    ],
)
def test_glob(pattern, path, expected):
    assert tree.glob_match(pattern, path) is expected


@given(st.text("ab*?.", min_size=1, max_size=6), st.text("ab.", min_size=1, max_size=6))
def test_glob_within_one_segment_is_fnmatch(pattern, name):
    if "**" in pattern:
        return
    assert tree.glob_match(pattern, name) == fnmatch.fnmatchcase(name, pattern)


def test_select_partition_combine(model):
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    chosen = tree.select(params, "**/kernel", exclude="layers/2/**")
    assert [p for p, c in tree.flatten(chosen).items() if c] == ["layers/0/kernel"]
    yes, no = tree.partition(params, chosen)
    assert list(tree.flatten(yes)) == ["layers/0/kernel"]
    assert len(tree.flatten(no)) == len(tree.flatten(params)) - 1
    back = tree.combine(yes, no)
    assert tree.flatten(back) == tree.flatten(params)


def test_select_with_a_glob_that_matches_nothing_names_near_paths(model):
    with pytest.raises(ValueError, match=r"'layers/0/kernl' matches nothing. Did you mean"):
        tree.select(nnx.state(model), "layers/0/kernl")


def test_nest_is_the_inverse_of_flatten():
    nested = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert tree.nest(tree.flatten(nested)) == nested


def test_counts():
    leaves = {"a": np.array([[1.0, 0.0], [-0.0, 2.0]], np.float32), "b": np.zeros(3, np.int8)}
    assert tree.count(leaves) == 7
    assert tree.nonzeros(leaves) == 2
    assert tree.nbytes(leaves) == 4 * 4 + 3
    assert tree.count(jax.ShapeDtypeStruct((2, 5), jnp.float32)) == 10


def test_same_structure_reports_everything_at_once():
    a = {"x": np.zeros((2, 3)), "y": np.zeros(2)}
    tree.check_same_structure(a, {"x": np.ones((2, 3)), "y": np.ones(2)}, what="mask")
    with pytest.raises(ValueError) as caught:
        tree.check_same_structure(a, {"x": np.zeros((3, 2)), "z": np.zeros(1)}, what="mask")
    text = str(caught.value)
    assert "missing: y" in text
    assert "not in the parameters: z" in text
    assert "shape of x: (3, 2), expected (2, 3)" in text
