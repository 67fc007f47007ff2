"""MPNIN's block-wise pre-training inside a run: what stays, what learns, resume, bad input."""

from __future__ import annotations

import numpy as np
import pytest
from flax import nnx

from cnnjax import data, models, pipeline, training, tree
from cnnjax.pipeline.stages import PretrainBlocks, Train

RECIPE = pipeline.Recipe(
    epochs=2.0,
    optimizer=training.OptimizerConfig("sgd", momentum=0.9, weight_decay=1e-4, decay_exclude=()),
    schedule=training.ScheduleConfig("cosine", base=0.05),
)


@pytest.fixture(scope="module")
def digits_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    data.info("digits", folder)
    return folder


def make(digits_dir, model, stages):
    config = pipeline.config_dict(
        "demo",
        model=pipeline.ModelSpec(model, {}),
        data=pipeline.DataConfig(
            "digits",
            data_dir=str(digits_dir),
            train="train[:512]",
            test="test[:200]",
            batch_size=64,
            eval_batch_size=200,
            workers=0,
        ),
        stages=stages,
    )
    config.data_parallel = False
    return config


def leaves(model):
    state = nnx.to_pure_dict(nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat)))
    return {k: np.asarray(v) for k, v in tree.flatten(state).items()}


@pytest.mark.slow
@pytest.mark.method("mpnin")
def test_blocks_are_pretrained_in_a_run_and_the_whole_is_tuned(digits_dir, tmp_path, monkeypatch):
    trained = []
    train = pipeline.Context.train

    def watched(self, model, recipe, **options):
        before = leaves(model)
        out = train(self, model, recipe, **options)
        trained.append((options.get("name", "train"), before, leaves(out.model())))
        return out

    monkeypatch.setattr(pipeline.Context, "train", watched)
    stages = {"blocks": PretrainBlocks(RECIPE), "train": Train(RECIPE)}
    config = make(digits_dir, "mpnin", stages)
    report = pipeline.run(config, tmp_path / "run", progress=False)
    assert [name for name, _, _ in trained] == ["block0", "block1", "block2", "train"]
    for index, (_, before, after) in enumerate(trained[:3]):
        changed = {k for k in before if not np.array_equal(before[k], after[k])}
        mine = {k for k in before if k.startswith((f"model/mlps/{index}/", "head/"))}
        # frozen blocks keep their bits, batch statistics and all, under weight decay too
        assert changed <= mine
        assert {k for k in mine if k.endswith(("kernel", "mean", "var"))} <= changed
        assert any(k.startswith("head/") for k in before) == (index < 2)
    # the next training starts from the pre-trained network, heads dropped
    start = trained[3][1]
    for k, v in trained[2][2].items():
        np.testing.assert_array_equal(start[k.removeprefix("model/")], v)
    first = report["runs"][0]["stages"][0]
    assert [p["block"] for p in first["curve"]] == [0, 1, 2]
    assert all(p["accuracy"] > 0.3 for p in first["curve"])  # chance: 0.1
    assert first["accuracy"] == first["curve"][2]["accuracy"]
    assert report["runs"][0]["stages"][1]["accuracy"] > 0.8


def test_a_network_without_mlpconv_blocks_is_refused(digits_dir, tmp_path, as_user):
    config = make(digits_dir, "plain_cnn", {"blocks": PretrainBlocks(RECIPE)})
    with pytest.raises(ValueError, match=r"stages.blocks: .*mlpconv blocks of a NiN"):
        pipeline.run(config, tmp_path / "run", progress=False)
    stage = PretrainBlocks(RECIPE)
    carry = pipeline.Carry(models.create("plain_cnn", rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="takes a NiN, got Plain"):
        stage.run(carry, None)
    carry = pipeline.Carry(models.abstract("mpnin"), mask={})
    with pytest.raises(ValueError, match="before stages that remove weights"):
        stage.run(carry, None)
    assert "pretrain_blocks" in pipeline.names()
