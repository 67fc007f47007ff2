"""Parameters and MACs of every classical, residual and dense variant, from shapes alone."""

from __future__ import annotations

from typing import Any

import models_a_oracle as oracle
import pytest


def row(name: str, params: int, macs: int | None = None, method: str = "", **fields: Any) -> Any:
    """One variant: catalogue figures and, if its name isn't the catalogue's id, that id."""
    label = "-".join([name, *(f"{k}={v}" for k, v in fields.items())])
    mark = pytest.mark.method(method or name)
    return pytest.param(name, fields, params, macs, id=label.replace(" ", ""), marks=mark)


CLASSICAL = [
    row("lenet_300_100", 266_610, 266_200),
    row("lenet_5", 61_706, 416_520),
    row("lenet_5_caffe", 431_080, 2_293_000, "lenet_5"),
    row("lenet_5_1998", 60_000, 326_520, "lenet_5"),
    row("alexnet", 61_100_840, 714_188_480),
    row("alexnet_caffe", 60_965_224, 724_406_816, "alexnet"),
    row("alexnet_caffe", 62_378_344, 1_135_256_096, "alexnet", groups=1),
    row("caffenet", 60_965_224, 724_406_816, "alexnet"),
    row("zfnet", 62_357_608, 1_168_032_896),
    row("zfnet_wide", 107_627_624, None, "zfnet"),
    row("vgg16", 138_357_544, 15_470_264_320),
    row("vgg16_bn", 138_365_992, 15_470_264_320, "vgg16"),
    row("vgg19", 143_667_240, 19_632_062_464),
    row("vgg19_bn", 143_678_248, 19_632_062_464, "vgg19"),
    row("vgg16_cifar", 14_987_722, 313_463_808),
    row("vgg16_cifar", 15_033_892, None, num_classes=100),
    row("vgg16_cifar_linear", 14_724_042, 313_201_664, "vgg16_cifar"),
    row("vgg19_cifar", 20_035_018, 398_136_320),
    row("vgg19_cifar", 20_081_188, None, num_classes=100),
]
RESIDUAL = [
    row("highway_19", 2_256_838, 330_826_728, "highway"),
    row("highway_19", 2_265_928, 330_835_728, "highway", num_classes=100),
    row("highway_10", 151_690, 31_650_624, "highway"),
    row("resnet18", 11_689_512, 1_814_073_344),
    row("resnet34", 21_797_672, 3_663_761_408),
    row("resnet50", 25_557_032, 4_089_184_256),
    row("resnet50", 25_557_032, 3_857_973_248, stride_on="1x1"),
    row("resnet50", 25_583_592, None, use_bias=True),
    row("resnet101", 44_549_160, 7_801_405_440),
    row("resnet101_v1", 44_549_160, 7_570_194_432, "resnet101"),
    row("resnet20_cifar", 269_722, 40_551_040, "resnet_cifar"),
    row("resnet20_cifar", 275_572, None, "resnet_cifar", num_classes=100),
    row("resnet20_cifar", 272_474, None, "resnet_cifar", shortcut="B"),
    row("resnet32_cifar", 464_154, 68_862_592, "resnet_cifar"),
    row("resnet32_cifar", 466_906, None, "resnet_cifar", shortcut="B"),
    row("resnet44_cifar", 658_586, 97_174_144, "resnet_cifar"),
    row("resnet44_cifar", 664_436, None, "resnet_cifar", num_classes=100),
    row("resnet56_cifar", 853_018, 125_485_696, "resnet_cifar"),
    row("resnet56_cifar", 855_770, None, "resnet_cifar", shortcut="B"),
    row("resnet1202_cifar", 19_421_274, 2_829_238_912, "resnet_cifar"),
    row("resnet1202_cifar", 19_427_124, None, "resnet_cifar", num_classes=100),
    row("resnet1202_cifar", 19_424_026, None, "resnet_cifar", shortcut="B"),
    row("stochastic_depth_1202", 19_421_274, 2_829_238_912, "stochastic_depth"),
    row("preact_resnet1001", 10_327_706, 1_487_849_984, "preact_resnet"),
    row("preact_resnet1001", 10_350_836, None, "preact_resnet", num_classes=100),
    row("resnext50_32x4d", 25_028_904, 4_230_479_872),
    row("resnext29_8x64d", 34_426_698, 5_387_266_048),
    row("resnext29_8x64d", 34_518_948, None, num_classes=100),
    row("resnext29_16x64d", 68_155_210, 10_688_866_304),
    row("resnext29_16x64d", 68_247_460, None, num_classes=100),
    row("resnext29_32x4d", 4_775_754, 774_055_936, "resnext29_8x64d"),
    row("resnext29_32x4d", 4_868_004, None, "resnext29_8x64d", num_classes=100),
    row("wrn_28_10", 36_479_194, 5_243_328_768),
    row("wrn_28_10", 36_536_884, None, num_classes=100),
    row("wrn_16_8", 10_961_370, 1_548_145_664),
    row("wrn_16_8", 11_007_540, None, num_classes=100),
    row("wrn_40_4", 8_949_210, 1_298_582_016),
    row("wrn_40_4", 8_972_340, None, num_classes=100),
    row("wrn_40_2", 2_243_546, 327_599_360),
    row("wrn_40_2", 2_255_156, None, num_classes=100),
    row("wrn_16_2", 691_674, 101_106_944),
    row("wrn_16_2", 703_284, None, num_classes=100),
    row("wrn_16_4", 2_748_890, 392_612_352, "wrn_16_2"),
    row("wrn_16_4", 2_772_020, None, "wrn_16_2", num_classes=100),
    row("wrn_22_8", 17_158_106, 2_454_115_328, "wrn_28_10"),
    row("wrn_22_8", 17_204_276, None, "wrn_28_10", num_classes=100),
    row("wrn_40_1", 563_930, 83_280_512, "wrn_40_2"),
    row("wrn_40_1", 569_780, None, "wrn_40_2", num_classes=100),
    row("wide_resnet50_2", 68_883_240, 11_398_021_120, "wrn_28_10"),
    row("rir_18_wide", 9_469_940, 1_531_723_776, "rir"),
    row("rir_18_wide", 9_504_680, 1_533_935_616, "rir", num_classes=100),
    row("rir_18_wide_projection", 9_492_980, 1_279_279_104, "rir"),
    row("rir_18_wide_projection", 9_527_720, None, "rir", num_classes=100),
    row("ror_3_wrn_40_4", 8_995_290, 1_304_087_040, "ror_3"),
    row("ror_3_wrn_40_4", 9_018_420, None, "ror_3", num_classes=100),
    row("multi_resnet_398_k5", 20_388_314, 2_937_768_448, "multi_resnet"),
    row("multi_resnet_26_k2_w10", 72_690_714, 10_457_372_928, "multi_resnet"),
    row("multi_resnet_26_k4_w10", 145_113_754, 20_885_461_248, "multi_resnet"),
]
DENSE = [
    row("densenet121", 7_978_856, 2_834_161_664),
    row("densenet_40_12", 1_019_722, 264_812_928),
    row("densenet_40_12", 1_060_132, None, num_classes=100),
    row("densenet_40_12", 1_059_298, None, stem_width=24),
    row("densenet_40_12", 599_050, None, stem_width=24, compression=0.5),
    row("ccnn_gender", 93_054, 1_007_784),
    row("cross_lenet_5", 62_571, 417_472),
]
# deep, unrolled: many modules to trace
SLOW = [
    row("densenet_bc_100_12", 769_162, 287_929_692),
    row("multi_resnet_26_k4_w10", 145_171_444, None, "multi_resnet", num_classes=100),
    row("multi_resnet_26_k2_w10", 72_748_404, None, "multi_resnet", num_classes=100),
    row("multi_resnet_398_k5", 20_411_444, None, "multi_resnet", num_classes=100),
    row("resnet152", 60_192_808, 11_513_626_624),
    row("resnet152_v1", 60_192_808, 11_282_415_616, "resnet152"),
    row("resnet110_cifar", 1_727_962, 252_887_680, "resnet_cifar"),
    row("resnet110_cifar", 1_733_812, None, "resnet_cifar", num_classes=100),
    row("resnet110_cifar", 1_730_714, None, "resnet_cifar", shortcut="B"),
    row("stochastic_depth_110", 1_727_962, 252_887_680, "stochastic_depth"),
    row("preact_resnet110", 1_727_962, 252_887_680, "preact_resnet"),
    row("preact_resnet164", 1_703_258, 244_500_992, "preact_resnet"),
    row("preact_resnet164", 1_726_388, None, "preact_resnet", num_classes=100),
    row("preact_resnet164", 1_703_258, 247_646_720, "preact_resnet", stride_on="3x3"),
    row("preact_resnet200", 64_666_152, 15_007_481_856, "preact_resnet"),
    row("resnext101_32x4d", 44_177_704, 7_969_996_800),
    row("resnext101_64x4d", 83_455_272, 15_460_270_080),
    row("resnext101_32x8d", 88_791_336, 16_414_015_488, "resnext101_32x4d"),
    row("ror_3_110", 1_734_906, 253_739_648, "ror_3"),
    row("ror_3_110", 1_740_756, None, "ror_3", num_classes=100),
    row("ror_3_164", 2_609_850, 381_141_632, "ror_3"),
    row("ror_3_164", 2_615_700, None, "ror_3", num_classes=100),
    row("ror_3_110", 1_637_690, 239_583_872, "ror_3", blocks_per_stage=17),
    row("ror_3_164", 2_512_634, 366_985_856, "ror_3", blocks_per_stage=26),
    row("ror_3_wrn_58_4", 13_645_530, 1_983_564_288, "ror_3"),
    row("ror_3_wrn_58_4", 13_668_660, None, "ror_3", num_classes=100),
    row("multi_resnet_200_k5", 10_187_354, 1_467_140_608, "multi_resnet"),
    row("multi_resnet_200_k5", 10_210_484, None, "multi_resnet", num_classes=100),
    row("densenet169", 14_149_480, 3_359_843_328),
    row("densenet201", 20_013_928, 4_291_365_888),
    row("densenet161", 28_681_000, 7_727_907_072),
    row("densenet264", 33_337_704, 5_751_653_376, "densenet121"),
    row("densenet_100_12", 6_979_642, 1_769_516_448),
    row("densenet_100_12", 7_084_852, None, num_classes=100),
    row("densenet_100_24", 27_249_082, 6_889_347_744),
    row("densenet_100_24", 27_457_972, None, num_classes=100),
    row("densenet_bc_100_12", 800_032, None, num_classes=100),
    row("densenet_bc_250_24", 15_324_406, 5_418_785_724),
    row("densenet_bc_250_24", 15_480_556, None, num_classes=100),
    row("densenet_bc_190_40", 25_624_430, 9_301_945_740),
    row("densenet_bc_190_40", 25_821_620, None, num_classes=100),
]


def check(name: str, fields: dict[str, Any], params: int, macs: int | None) -> None:
    got = oracle.counts(name, **fields)
    assert got[0] == params
    if macs is not None:
        assert got[1] == macs


@pytest.mark.parametrize(("name", "fields", "params", "macs"), CLASSICAL + RESIDUAL + DENSE)
def test_counts_equal_the_catalogue(name, fields, params, macs):
    check(name, fields, params, macs)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "fields", "params", "macs"), SLOW)
def test_counts_of_deep_variants_equal_the_catalogue(name, fields, params, macs):
    check(name, fields, params, macs)


def test_the_counter_counts_a_known_network_by_hand():
    # dense 784-300-100-10
    assert oracle.counts("lenet_300_100")[1] == 784 * 300 + 300 * 100 + 100 * 10
    # a scan of blocks counts as often as it turns
    scanned = oracle.counts("resnet32_cifar", scan=True)
    assert scanned == oracle.counts("resnet32_cifar")
