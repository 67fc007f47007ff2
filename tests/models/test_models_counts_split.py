"""Where the parameters and MACs lie: the catalogue's splits, statistics and relations."""

from __future__ import annotations

import math

import jax
import models_a_oracle as oracle
import pytest
from flax import nnx

from cnnjax import models
from cnnjax.models import keras_layers, lenet_1998


def split(name: str, **fields) -> dict[str, int]:
    """Parameters by kind of layer, the running statistics, and the dense layers' MACs."""
    model = models.abstract(name, **fields)
    out = dict.fromkeys(("conv", "fc", "bn", "statistics", "fc_macs"), 0)

    def size(module):
        return sum(math.prod(v.shape) for v in jax.tree.leaves(nnx.state(module, nnx.Param)))

    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Conv):
            out["conv"] += size(module)
        elif isinstance(module, nnx.Linear):
            out["fc"] += size(module)
            out["fc_macs"] += math.prod(module.kernel.shape)
        elif isinstance(module, nnx.BatchNorm):
            out["bn"] += size(module)
    stats = nnx.state(model, nnx.BatchStat)
    out["statistics"] = sum(math.prod(v.shape) for v in jax.tree.leaves(stats))
    return out


# the survey's Table 1: name, fields, conv and FC parameters, norms', conv and FC MACs
TABLE = [
    ("alexnet_caffe", {}, 2_334_080, 58_631_144, 0, 665_784_864, 58_621_952),
    ("zfnet", {}, 3_726_464, 58_631_144, 0, 1_109_410_944, 58_621_952),
    ("vgg16", {}, 14_714_688, 123_642_856, 0, 15_346_630_656, 123_633_664),
    ("googlenet_caffe", {}, 5_973_552, 1_025_000, 0, 1_581_647_872, 1_024_000),
    ("resnet50_v1", {}, 23_454_912, 2_049_000, 53_120, 3_855_925_248, 2_048_000),
    ("lenet_300_100", {}, 0, 235_500 + 30_100 + 1_010, 0, 0, 266_200),
]


@pytest.mark.parametrize(
    ("name", "fields", "conv", "fc", "bn", "conv_macs", "fc_macs"), TABLE, ids=[r[0] for r in TABLE]
)
def test_convolutions_and_dense_layers(name, fields, conv, fc, bn, conv_macs, fc_macs):
    got = split(name, **fields)
    assert (got["conv"], got["fc"], got["bn"], got["fc_macs"]) == (conv, fc, bn, fc_macs)
    assert oracle.counts(name, **fields) == (conv + fc + bn, conv_macs + fc_macs)


@pytest.mark.method("lenet_5")
def test_the_1998_lenet_layer_by_layer():
    model = models.abstract("lenet_5_1998")

    def size(module):
        return sum(math.prod(v.shape) for v in jax.tree.leaves(nnx.state(module, nnx.Param)))

    found = {"conv": 0, "subsampling": 0, "fc": 0}
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Conv):
            found["conv"] += size(module)
        elif isinstance(module, lenet_1998.Subsampling):
            found["subsampling"] += size(module)
        elif isinstance(module, nnx.Linear):
            found["fc"] += size(module)
    assert found == {"conv": 156 + 1_516 + 48_120, "subsampling": 12 + 32, "fc": 10_164}


@pytest.mark.parametrize(
    ("name", "expected"),
    [("resnet152", (57_992_384, 60_192_808))],
)
@pytest.mark.slow
def test_share_of_the_convolutions(name, expected):
    conv, total = expected
    assert split(name)["conv"] == conv
    assert oracle.counts(name)[0] == total
    assert round(100 * conv / total, 1) == 96.3


# parameters and statistics together, as Keras counts them: name, its fields, total
KERAS = [
    ("xception", 22_910_480, 54_528),
    ("mobilenet_v1", 4_253_864, 21_888),
    ("mobilenet_v1_075", 2_601_976, None),
    ("mobilenet_v1_050", 1_342_536, None),
    ("mobilenet_v1_025", 475_544, None),
    ("mobilenet_v2", 3_538_984, 34_112),
    ("densenet121", 8_062_504, 83_648),
    ("densenet169", 14_307_880, None),
    ("densenet201", 20_242_984, None),
    ("inception_v3", 23_851_784, 34_432),
    ("inception_resnet_v2", 55_873_736, None),
    ("resnet50_v1", 25_636_712, None),
    ("preact_resnet50", 25_568_360 + 45_440, 45_440),
]
QUICK = ("xception", "mobilenet_v1", "mobilenet_v1_025", "resnet50_v1")


@pytest.mark.parametrize(
    ("name", "total", "statistics"),
    [pytest.param(*r, id=r[0], marks=() if r[0] in QUICK else pytest.mark.slow) for r in KERAS],
)
def test_keras_totals(name, total, statistics):
    """Keras counts running means and variances too; its Inceptions have no gamma."""
    fields = keras_layers.keras_fields(keras_layers.counterpart(name))
    model = models.abstract(name, **fields)
    both = nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))
    assert sum(math.prod(v.shape) for v in jax.tree.leaves(both)) == total
    if statistics is not None:
        assert split(name, **fields)["statistics"] == statistics


@pytest.mark.parametrize(
    ("name", "features", "times"),
    [("resnet20_cifar", 64, 1), ("nin_cifar", 192, 1), ("maxout_nin", 192, 5)],
)
def test_more_classes_cost_their_rows_alone(name, features, times):
    """C100 - C10 = 90 (features + 1) for a biased classifier; k maps a class and their norms."""
    ten, hundred = (oracle.counts(name, num_classes=n)[0] for n in (10, 100))
    row = features + 1 if times == 1 else times * (features + 1 + 2)
    assert hundred - ten == 90 * row


@pytest.mark.method("resnet_cifar")
@pytest.mark.parametrize(
    "name", ["resnet20_cifar", pytest.param("resnet56_cifar", marks=pytest.mark.slow)]
)
def test_projections_cost_the_same_at_every_depth(name):
    a, b = (oracle.counts(name, shortcut=s)[0] for s in "AB")
    assert b - a == 16 * 32 + 64 + 32 * 64 + 128 == 2_752


@pytest.mark.parametrize(
    ("name", "fields", "params"),
    [
        ("resnet32_cifar", {"num_classes": 100}, 470_004),
        ("resnet44_cifar", {"shortcut": "B"}, 661_338),
        ("resnet56_cifar", {"num_classes": 100}, 858_868),
    ],
)
@pytest.mark.slow
@pytest.mark.method("resnet_cifar")
def test_remaining_figures(name, fields, params):
    assert oracle.counts(name, **fields)[0] == params


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "aux"),
    [
        ("inception_v3", 3_326_696),
        ("inception_v4", 3_359_464),
        ("inception_resnet_v2", 3_367_656),
    ],
)
def test_auxiliary_heads(name, aux):
    plain, both = (oracle.counts(name, aux_heads=on)[0] for on in (False, True))
    assert both - plain == aux


# --- the arithmetic of the survey's Section 4, on our own layers ---


def weights(*kernels: tuple[int, ...]) -> int:
    """Kernel weights of a chain of convolutions (kh, kw, c_in, c_out, groups), really built."""
    total = 0
    for kh, kw, c_in, c_out, *groups in kernels:
        layer = nnx.eval_shape(
            lambda kh=kh, kw=kw, i=c_in, o=c_out, g=(groups or [1])[0]: nnx.Conv(
                i, o, (kh, kw), feature_group_count=g, use_bias=False, rngs=nnx.Rngs(0)
            )
        )
        total += math.prod(layer.kernel.shape)
    return total


def test_factored_convolutions_save_what_the_survey_says():
    c = 8
    five = weights((5, 5, c, c))
    assert round(1 - weights((3, 3, c, c), (3, 3, c, c)) / five, 2) == 0.28
    three, seven = weights((3, 3, c, c)), weights((7, 7, c, c))
    assert round(1 - weights((1, 3, c, c), (3, 1, c, c)) / three, 3) == 0.333
    assert round(1 - weights(*3 * ((3, 3, c, c),)) / seven, 3) == 0.449
    assert round(1 - weights((1, 7, c, c), (7, 1, c, c)) / seven, 3) == 0.714
    separable = weights((3, 3, 512, 512, 512), (1, 1, 512, 512))
    assert round(separable / weights((3, 3, 512, 512)), 4) == 0.1131
    assert weights((1, 1, 24, 48, 4)) * 4 == weights((1, 1, 24, 48))
    # with m channels between, the saving turns negative above 25 c_in c_out / (9 (c_in + c_out))
    c_in, c_out = 18, 18
    limit = 25 * c_in * c_out / (9 * (c_in + c_out))
    assert limit == 25
    for m, saves in ((24, True), (25, False), (26, False)):
        chain = weights((3, 3, c_in, m), (3, 3, m, c_out))
        assert (chain < weights((5, 5, c_in, c_out))) == saves
