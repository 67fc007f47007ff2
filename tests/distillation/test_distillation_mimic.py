"""Learning from made-up images and from selected neurons, through the stage, on digits."""

from __future__ import annotations

import pytest

from cnnjax import data, pipeline, training
from cnnjax.distillation import DistillConfig
from cnnjax.pipeline.stages import Distill, KeepTeacher, RecallTeacher, Train

SOFT = DistillConfig(hard=0.0, soft_weight=1.0, temperature=2.0)
LATE = (("denses/0", "denses/0"),)
NEURONS = DistillConfig(hard=1.0, soft="none", neuron_weight=1.0, neurons=LATE, neuron_count=12)


def recipe(epochs):
    schedule = training.ScheduleConfig("cosine", base=1e-2)
    return pipeline.Recipe(epochs=epochs, schedule=schedule, checkpoint_every=0.0)


@pytest.mark.slow
@pytest.mark.method("model_compression_mimic")
@pytest.mark.method("munge")
@pytest.mark.method("neuron_mimic")
@pytest.mark.method("teacher_student_pipeline")
def test_students_of_synthetic_images_and_of_neurons(tmp_path):
    data.info("digits", tmp_path / "tfds")
    mlp = pipeline.ModelSpec("plain_mlp", {"hidden": (24,)})
    few = {"student": mlp, "split": "train[:300]", "order": "few"}
    config = pipeline.config_dict(
        "demo",
        model=pipeline.ModelSpec("plain_mlp", {"hidden": (64,)}),
        data=pipeline.DataConfig(
            "digits",
            data_dir=str(tmp_path / "tfds"),
            batch_size=50,
            eval_batch_size=355,
            workers=0,
        ),
        stages={
            "teacher": Train(recipe(5.0)),
            "keep": KeepTeacher(),
            "munge": Distill(recipe(30.0), SOFT, synthetic="munge", multiplier=10, **few),
            "marginals": Distill(recipe(30.0), SOFT, synthetic="marginals", multiplier=10, **few),
            "neurons": Distill(recipe(20.0), NEURONS, first=recipe(10.0), **few),
            "again": RecallTeacher(),
        },
    )
    config.data_parallel = False
    report = pipeline.run(config, tmp_path / "run", progress=False)
    found = {r["name"]: r for r in report["runs"][0]["stages"]}
    # Bucila et al.: images near the data teach, independent pixels don't
    assert found["munge"]["accuracy"] > found["marginals"]["accuracy"] + 0.02
    assert found["munge"]["accuracy"] > 0.8
    assert found["neurons"]["accuracy"] > 0.8
    assert found["again"]["accuracy"] == found["teacher"]["accuracy"]
    # a student has no adapter left
    assert found["neurons"]["params"] == found["munge"]["params"]
