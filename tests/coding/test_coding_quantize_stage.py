"""Quantization-aware training as a stage of a run, on real digits."""

from __future__ import annotations

import numpy as np
import pytest

from cnnjax import coding, data, pipeline, training
from cnnjax.pipeline.stages import Quantize, Train
from cnnjax.tree import flatten

pytestmark = pytest.mark.method("deep_compression")


def config(folder, stages):
    out = pipeline.config_dict(
        "demo",
        model=pipeline.ModelSpec("plain_mlp", {"hidden": (24,)}),
        data=pipeline.DataConfig(
            "digits", data_dir=str(folder), batch_size=64, eval_batch_size=355, workers=0
        ),
        stages=stages,
    )
    out.data_parallel = False
    return out


@pytest.mark.slow
def test_training_through_the_rounding_beats_rounding(tmp_path):
    folder = tmp_path / "tfds"
    data.info("digits", folder)
    schedule = training.ScheduleConfig("cosine", base=1e-2)
    recipe = pipeline.Recipe(epochs=6.0, schedule=schedule, steps_per_call=11)
    stages = {"dense": Train(recipe), "q": Quantize(recipe, bits={"denses/**": 2, "**": 3})}
    report = pipeline.run(config(folder, stages), tmp_path / "run", progress=False)
    dense, quantized = report["runs"][0]["stages"]
    assert quantized["metrics"]["accuracy_untrained"] < quantized["accuracy"]
    assert quantized["accuracy"] > dense["accuracy"] - 0.08
    blob = (tmp_path / "run/seed0/q/quantized.cnnz").read_bytes()
    assert quantized["metrics"]["file_bytes"] == len(blob)
    coded = flatten(coding.unpack(blob).coded)
    assert coded  # nodes are flattened into codes and scales; the values are checked below
    params = flatten(coding.decompress(blob))
    with np.load(tmp_path / "run/seed0/q/network/arrays.npz") as saved:
        for path, leaf in params.items():
            np.testing.assert_array_equal(saved[path], leaf)
    for path, levels in (("denses/0/kernel", 3), ("head/kernel", 7)):
        per_channel = [len(np.unique(column)) for column in np.asarray(params[path]).T]
        assert max(per_channel) <= levels
        assert len(np.unique(params[path])) > levels  # each channel has a scale of its own


def test_what_cannot_be_is_refused_before_any_work(tmp_path):
    folder = tmp_path / "tfds"
    data.info("digits", folder)
    for stage, message in (
        (Quantize(include=("conv/**",)), "matches nothing"),
        (Quantize(bits={"conv/**": 3}), "matches nothing"),
        (Quantize(bits=1), "bits must be 2 to 16"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline.run(config(folder, {"q": stage}), tmp_path / "run", progress=False)
