"""Parameters and MACs of the Inception, NiN, fractal and mobile nets: the catalogue's figures."""

from __future__ import annotations

from typing import Any

import models_b_oracle as oracle
import pytest

AUX = {"aux_heads": True}
ABLATION: dict[str, Any] = {"widths": (16, 32, 64, 128, 128), "dropout": ()}

# name, fields, input size (None: standard), parameters, MACs (float: printed in millions)
QUICK: list[tuple[str, dict[str, Any], int | None, int, int | float | None]] = [
    ("googlenet", {}, None, 6_624_904, 1_498_376_192),
    ("googlenet_caffe", {}, None, 6_998_552, 1_582_671_872),
    ("inception_v2", {}, None, 11_194_984, 2_018_851_840),
    ("inception_v3", {}, None, 23_834_568, 5_713_216_096),
    ("xception", {}, None, 22_855_952, 8_357_403_496),
    ("nin_cifar", {}, None, 966_986, 222_486_528),
    ("nin_cifar", {"num_classes": 100}, None, 984_356, 223_592_448),
    ("nin_imagenet", {}, None, 7_595_176, 1_100_188_800),
    ("maxout_nin", {}, None, 1_614_294, 496_656_384),
    ("maxout_nin", {"num_classes": 100}, None, 1_702_044, 502_185_984),
    ("cic", {}, None, 865_258, 180_359_168),
    ("cic", {"window": 32}, None, 879_946, 186_441_728),
    ("cic", {"window_size": 3}, None, 887_018, 189_370_368),
    ("mpnin", {}, None, 969_822, 222_486_528),
    ("mpnin", {"num_classes": 100}, None, 987_372, 223_592_448),
    ("fractalnet_cifar", {}, None, 33_724_618, 845_222_912),
    ("fractalnet_cifar", {"num_classes": 100}, None, 33_770_788, None),
    ("fractalnet_cifar", {"columns": 1, **ABLATION}, None, 246_682, 4.6),
    ("fractalnet_cifar", {"columns": 2, **ABLATION}, None, 836_106, 19.2),
    ("fractalnet_cifar", {"columns": 3, **ABLATION}, None, 2_113_594, 53.8),
    ("fractalnet_cifar", {"columns": 4, **ABLATION}, None, 4_767_210, 128.6),
    ("mobilenet_v1", {}, None, 4_231_976, 568_740_352),
    ("mobilenet_v1_075", {}, None, 2_585_560, 325.40),
    ("mobilenet_v1_050", {"image_size": 160}, None, 1_331_592, 76.52),
    ("mobilenet_v1_025", {}, 128, 470_072, 13.57),
    ("mobilenet_v2", {}, None, 3_504_872, 300_774_272),
    ("mobilenet_v2_035", {}, None, 1_677_128, 59_285_808),
    ("mobilenet_v2_140", {}, None, 6_108_776, 582_195_824),
    ("mobilenet_v2", {}, 96, 3_504_872, 56_289_152),
    ("shufflenet_v1_g1", {}, None, 1_531_936, 143_078_976),
    ("shufflenet_v1_g2", {}, None, 1_733_848, 140_836_512),
    ("shufflenet_v1_g3", {}, None, 1_865_728, 137_460_672),
    ("shufflenet_v1_g4", {}, None, 1_968_344, 134_339_776),
    ("shufflenet_v1_g8", {}, None, 2_434_768, 138_365_952),
]
SLOW: list[tuple[str, dict[str, Any], int | None, int, int | float | None]] = [
    ("googlenet", AUX, None, 13_004_888, 1_498_376_192),
    ("googlenet_caffe", AUX, None, 13_378_280, 1_582_671_872),
    ("googlenet_bn", {}, None, 7_005_832, 1_582_671_872),
    ("googlenet_bn", AUX, None, 13_385_816, 1_582_671_872),
    ("inception_v2_slim", {}, None, 11_188_288, 1_934_857_216),
    ("inception_v2", {"proj_width": 128}, None, 11_285_224, 2_032_600_064),
    ("inception_v2_caffe", {}, None, 11_295_240, 2_032_600_064),
    ("inception_v3", AUX, None, 27_161_264, 5_713_216_096),
    ("inception_v3", {"use_scale": False}, None, 23_817_352, 5_713_216_096),
    ("inception_v4", {}, None, 42_679_816, 12_253_974_624),
    ("inception_v4", AUX, None, 46_039_280, 12_253_974_624),
    ("inception_resnet_v1", {}, None, 22_756_328, 6_206_361_696),
    ("inception_resnet_v1", {"final_block": True}, None, 24_357_096, None),
    ("inception_resnet_v2", {}, None, 55_843_464, 13_155_794_016),
    ("inception_resnet_v2", AUX, None, 59_211_120, 13_155_794_016),
    ("inception_resnet_v2_paper", {}, None, 32_433_928, 9_257_953_632),
    *[
        ("cic", {"window": k}, None, p, None)
        for k, p in ((9, 867_434), (16, 871_242), (64, 897_354))
    ],
    ("fractalnet_cifar", {"columns": 5, **ABLATION}, None, 10_173_082, 283.6),
    ("fractalnet_cifar", {"columns": 6, **ABLATION}, None, 21_083_466, 599.0),
    ("fractalnet34", {}, None, 164_031_016, 24_164_982_784),
    *[
        (name, {}, size, params, macs)
        for name, params, row in (
            ("mobilenet_v1", 4_231_976, (418.12, 290.68, 186.40)),
            ("mobilenet_v1_075", 2_585_560, (239.27, 166.40, 106.77)),
            ("mobilenet_v1_050", 1_331_592, (109.97, 76.52, 49.16)),
            ("mobilenet_v1_025", 470_072, (30.21, 21.06, 13.57)),
            ("mobilenet_v2", 3_504_872, (221_316_608, 154_083_200, 99_074_048)),
        )
        for size, macs in zip((192, 160, 128), row)
    ],
    ("mobilenet_v1_050", {}, None, 1_331_592, 149.50),
    ("mobilenet_v1_025", {}, None, 470_072, 41.03),
    ("mobilenet_v2_050", {}, None, 1_968_680, 97_131_840),
    ("mobilenet_v2_075", {}, None, 2_636_424, 209_069_792),
    *[
        ("shufflenet_v1", {"groups": g, "scale": s, "stem_width": stem}, None, params, macs)
        for s, g, stem, params, macs in (
            (0.5, 1, None, 534_484, 38.52),
            (0.5, 3, None, 718_324, 37.59),
            (0.5, 8, None, 1_011_448, 40.47),
            (0.25, 1, None, 209_908, 13.16),
            (0.25, 1, 6, 209_746, 11.00),
            (0.25, 3, None, 306_124, 13.30),
            (0.25, 3, 6, 305_902, 11.01),
            (0.25, 8, None, 454_888, 15.72),
            (1.5, 3, None, 3_442_168, 292.44),
            (1.5, 3, 36, 3_443_212, 299.61),
            (1.5, 8, None, 4_269_952, 290.19),
            (2.0, 3, None, 5_450_776, 524.05),
            (2.0, 8, None, 6_522_232, 521.94),
        )
    ],
]


def _check(name, fields, size, params, macs) -> None:
    got = oracle.counts(name, size, **fields)
    assert got[0] == params
    if isinstance(macs, float):
        digits = 1 if name.startswith("fractalnet") else 2
        assert round(got[1] / 1e6, digits) == macs
    elif macs is not None:
        assert got[1] == macs


@pytest.mark.parametrize("row", QUICK, ids=lambda r: f"{r[0]}-{r[1]}-{r[2]}")
def test_counts(row):
    _check(*row)


@pytest.mark.slow
@pytest.mark.parametrize("row", SLOW, ids=lambda r: f"{r[0]}-{r[1]}-{r[2]}")
def test_counts_of_every_variant(row):
    _check(*row)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "more"), [("googlenet_caffe", 8_372_224), ("inception_v3", 5_683_200)]
)
def test_auxiliary_macs(name, more):
    plain = oracle.counts(name, aux_heads=True)[1]
    with_aux = oracle.counts(name, call=lambda m, x: m(x, aux=True), aux_heads=True)[1]
    assert with_aux - plain == more


def test_shufflenet_rounds_channels_up_and_says_so():
    from cnnjax import models

    config = models.config("shufflenet_v1", groups=2, scale=0.5)
    # 200 / 2 / 4 = 25 does not divide by 2
    assert config.stage_channels == (104, 200, 400)
    assert config.stem_channels == 12
    assert models.config("shufflenet_v1", groups=8, scale=0.5).stem_channels == 16
