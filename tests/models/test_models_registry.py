"""The registry: names, fields, provenance, errors; quick initialisers."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cnnjax import models, tree
from cnnjax.models import init, registry


def test_every_name_has_a_config_and_an_input_shape():
    names = models.names()
    assert len(names) > 60
    assert list(names) == sorted(names)
    for name in names:
        config = models.config(name)
        assert hash(config) == hash(models.config(name))
        # provenance goes to JSON and back
        fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        again = models.config(name, **json.loads(json.dumps(fields)))
        assert again == config
        assert models.input_shape(name)[2] == config.in_channels


def test_unknown_names_and_fields_suggest_the_right_ones(as_user):
    with pytest.raises(ValueError, match="unknown model 'resnet5O'.*'resnet50'"):
        models.create("resnet5O", rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="no field 'num_class'.*'num_classes'"):
        models.config("resnet50", num_class=10)
    with pytest.raises(
        TypeError, match=r"rngs must be random streams, e.g. flax.nnx.Rngs\(0\), got 0"
    ):
        models.create("lenet_5", rngs=0)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("resnet50", {"num_classes": 0}, "num_classes must be an integer >= 1, got 0"),
        ("resnet50", {"dtype": "float12"}, "dtype 'float12' is not one of"),
        ("resnet20_cifar", {"shortcut": "C"}, "shortcut 'C' is not one of 'A'"),
        ("resnet20_cifar", {"survival": 0.0}, r"survival must be in \(0, 1\]"),
        ("densenet121", {"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ("densenet121", {"compression": 2.0}, r"compression must be in \(0, 1\]"),
        ("resnet18", {"groups": 2}, "need block='bottleneck'"),
        ("vgg16", {"stages": (1, 1)}, "equally long"),
        ("highway_19", {"stage_dropout": (0.1,)}, "one rate per stage"),
        ("zfnet", {"image_size": 8}, "image_size must be at least"),
        ("resnet20_cifar", {"widths": 16}, r"widths must be tuple\[int, ...\], got 16"),
        (
            "resnet20_cifar",
            {"widths": (16, 2.5)},
            r"widths must be tuple\[int, ...\], got \(16, 2.5\)",
        ),
        ("resnet50", {"stages": (3, 0)}, r"stages must hold numbers >= 1, got \(3, 0\)"),
        ("zfnet", {"widths": (8, 8)}, r"widths must be tuple\[int, int, int\], got \(8, 8\)"),
        ("resnet50", {"remat": 3}, "remat must be bool, got 3"),
        ("densenet121", {"compression": "half"}, "compression must be float, got 'half'"),
    ],
)
def test_bad_fields_are_refused(name, fields, message, as_user):
    with pytest.raises(ValueError, match=message):
        models.config(name, **fields)


def test_groups_must_divide_the_channels():
    with pytest.raises(ValueError, match="3 groups don't divide the channels"):
        models.abstract("alexnet_caffe", groups=3)
    with pytest.raises(ValueError, match="no channel per group"):
        models.config("resnext29_8x64d", width=8, group_width=4)


def test_provenance_rebuilds_the_model():
    model = models.create(
        "resnet20_cifar", rngs=nnx.Rngs(0), widths=[4, 8], dtype=jnp.bfloat16, blocks_per_stage=1
    )
    data = json.loads(json.dumps(model.provenance.as_dict()))
    assert data["fields"]["dtype"] == "bfloat16"
    again = models.create(data["name"], rngs=nnx.Rngs(1), **data["fields"])
    assert again.provenance == model.provenance == registry.Provenance.from_dict(data)
    assert nnx.split(again)[0] == nnx.split(model)[0]


def test_a_second_registration_must_agree():
    shape = (32, 32, 3)
    entry = models.config("resnet20_cifar")
    from cnnjax.models.resnet_cifar import ResNetCifar

    registry.register("resnet20_cifar", ResNetCifar, entry, input_shape=shape)
    with pytest.raises(ValueError, match="already registered"):
        registry.register("resnet20_cifar", ResNetCifar, entry, input_shape=(64, 64, 3))


def test_abstract_has_no_arrays_and_the_created_shapes():
    fields = {"blocks_per_stage": 1, "widths": (4, 8), "survival": 0.5}
    shapes = nnx.state(models.abstract("stochastic_depth_110", **fields), nnx.Param)
    arrays = nnx.state(models.create("stochastic_depth_110", rngs=nnx.Rngs(0), **fields), nnx.Param)
    assert all(isinstance(s, jax.ShapeDtypeStruct) for s in jax.tree.leaves(shapes))
    a, b = tree.flatten(shapes), tree.flatten(arrays)
    assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}


@pytest.mark.parametrize(
    ("make", "std"),
    [
        (lambda: init.he_normal("out"), (2 / (9 * 64)) ** 0.5),
        (lambda: init.he_normal("in"), (2 / (9 * 48)) ** 0.5),
        (lambda: init.uniform_fan_in(1.0), (1 / (9 * 48)) ** 0.5),
        (lambda: init.normal(0.01), 0.01),
    ],
)
def test_initialisers_have_their_spread_and_agree_under_jit(make, std):
    key, shape = jax.random.key(3), (3, 3, 48, 64)
    eager = make()(key, shape)
    assert eager.shape == shape
    # 27,648 draws: the standard error of the spread is below half a percent
    assert float(np.std(eager)) == pytest.approx(std, rel=0.02)
    assert abs(float(np.mean(eager))) < 4 * std / np.sqrt(eager.size)
    np.testing.assert_array_equal(jax.jit(lambda k: make()(k, shape))(key), eager)
    with init.without_draws():
        assert not np.any(make()(key, shape))
