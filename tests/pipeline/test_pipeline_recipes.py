"""Every config file: what it says can be built, without data or computing."""

from __future__ import annotations

import pathlib

import pytest

from cnnjax import models, pipeline, training
from cnnjax.pipeline import recipes

FILES = sorted((pathlib.Path(__file__).resolve().parents[2] / "configs").glob("*.py"))
TRAINING = [
    f
    for f in FILES
    if f.stem.startswith(("cifar10_", "imagenet_")) and "get_config" in f.read_text()
]


@pytest.mark.parametrize("file", TRAINING, ids=lambda f: f.stem)
def test_config_files_hold_what_can_be_built(file):
    config = pipeline.load_config(file)
    run = pipeline.from_config(config)
    assert run.name == file.stem
    assert run.stages
    spec = models.config(run.model.name, **run.model.fields)
    assert spec.num_classes >= 10
    # the docstring is the record: the command that runs it
    text = file.read_text()
    assert f"--config=configs/{file.name}" in text
    for stage in run.stages.values():
        recipe = getattr(stage, "recipe", None)
        if recipe is None:
            continue
        schedule = training.build_schedule(
            recipe.schedule, total_steps=10_000_000, steps_per_epoch=400
        )
        assert float(schedule(10_000)) > 0
        training.build_optimizer(recipe.optimizer, schedule)
    for figure in run.expected.values():
        error = figure.get("error")
        assert error is None or 0 < error < 1
        assert figure["source"]


def test_every_family_has_a_recipe():
    """Each architecture of the catalogue's recipe tables is trained by some config."""
    found = {pipeline.from_config(pipeline.load_config(f)).model.name for f in TRAINING}
    wanted = {
        "resnet110_cifar", "preact_resnet164", "stochastic_depth_110", "wrn_28_10",
        "densenet_bc_100_12", "resnext29_8x64d", "fractalnet_cifar", "rir_18_wide",
        "ror_3_wrn_40_4", "multi_resnet_200_k5", "highway_19", "nin_cifar", "maxout_nin", "cic",
        "mpnin",
        "vgg16_cifar", "vgg19_cifar", "alexnet_caffe", "zfnet", "vgg16_bn", "googlenet",
        "inception_v2", "inception_v3", "inception_v4", "inception_resnet_v1",
        "inception_resnet_v2", "xception", "resnet50_v1", "preact_resnet200", "resnext50_32x4d",
        "densenet121", "mobilenet_v1", "mobilenet_v2", "shufflenet_v1", "fractalnet34",
    }  # fmt: skip
    bare = {name.split("_g")[0] if name.startswith("shufflenet") else name for name in found}
    bare |= {"googlenet" for name in found if name.startswith("googlenet")}
    assert wanted <= bare


def test_unknown_statistics_are_refused():
    with pytest.raises(ValueError, match="no pixel statistics 'cifar1O'. Did you mean 'cifar10'"):
        recipes.cifar(
            "x", "nin_cifar", pipeline.Recipe(), batch_size=1, error=None, source="", data="cifar1O"
        )
