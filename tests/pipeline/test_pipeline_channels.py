"""The channels stage on digits: fewer MACs as asked, proved, counted again, resumed."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import pytest

import cnnjax
from cnnjax import pipeline
from cnnjax.pipeline.stages import Channels, Train
from cnnjax.training import OptimizerConfig, ScheduleConfig


def config(**options):
    recipe = pipeline.Recipe(
        epochs=2.0,
        optimizer=OptimizerConfig("adam"),
        schedule=ScheduleConfig("cosine", base=2e-3),
        checkpoint_every=2.0,
    )
    made = pipeline.config_dict(
        "channels_digits",
        model=pipeline.ModelSpec("plain_cnn"),
        data=pipeline.DataConfig("digits", batch_size=64, workers=0),
        stages={"dense": Train(recipe), "small": Channels(recipe, speed_batch=0, **options)},
    )
    made.data_parallel = False
    return made


def test_half_of_the_macs(tmp_path):
    pipeline.run(config(macs=0.5), tmp_path, progress=False)
    done = json.loads(next(tmp_path.rglob("small/done.json")).read_text())
    found = done["metrics"]
    assert 0.2 < found["macs_share"] <= 0.5
    assert found["accuracy_after_fine_tuning"] > 0.5
    assert found["accuracy_before"] >= found["accuracy_after_shrinking"] - 0.05
    # the saved arrays have the widths that the record names, counted here on their own
    before = cnnjax.profile(
        cnnjax.models.abstract("plain_cnn"), jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
    )
    assert done["macs"] == round(found["macs_share"] * before.macs)
    # a second start says that it is complete and leaves the report alone
    report = (tmp_path / "report.json").read_text()
    pipeline.run(config(macs=0.5), tmp_path, progress=False)
    assert (tmp_path / "report.json").read_text() == report


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "l3"}, "unknown score 'l3'"),
        ({"scope": "galaxy"}, "unknown scope"),
        ({"macs": 1.5}, "macs is 1.5"),
        ({"macs": 0.5, "ratio": 0.5}, "one of macs and ratio"),
        ({"macs": 0.0}, "one of macs and ratio"),
        ({"recalibrate": -1}, "recalibrate is -1"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        Channels(**options)
