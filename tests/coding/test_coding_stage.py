"""The deep-compression stage of a pipeline run, on real digits."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

from cnnjax import coding, data, pipeline, training
from cnnjax import tree as treelib
from cnnjax.pipeline.stages import DeepCompression, Prune, Train

pytestmark = pytest.mark.method("deep_compression")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    data.info("digits", folder)

    def recipe(epochs):
        schedule = training.ScheduleConfig("cosine", base=1e-2)
        return pipeline.Recipe(epochs=epochs, schedule=schedule, steps_per_call=11)

    config = pipeline.config_dict(
        "demo",
        model=pipeline.ModelSpec("plain_mlp", {"hidden": (48, 24)}),
        data=pipeline.DataConfig(
            "digits", data_dir=str(folder), batch_size=64, eval_batch_size=355, workers=0
        ),
        stages={
            "dense": Train(recipe(8.0)),
            "pruned": Prune(recipe(3.0), sparsity=0.7, cuts=2),
            "coded": DeepCompression(recipe(1.0), bits=4),
        },
    )
    config.data_parallel = False
    workdir = tmp_path_factory.mktemp("run")
    return config, workdir, pipeline.run(config, workdir, progress=False)


def test_the_stage_writes_the_file_and_keeps_the_accuracy(finished):
    _, workdir, report = finished
    dense, pruned, coded = report["runs"][0]["stages"]
    blob = (workdir / "seed0/coded/compressed.cnnz").read_bytes()
    assert coded["metrics"]["file_bytes"] == len(blob)
    parameters = 64 * 48 + 48 * 24 + 24 * 10 + 48 + 24 + 10
    assert coded["metrics"]["file_ratio"] == 4 * parameters / len(blob)
    # digits is small: biases, tables and the header weigh more than in a real network
    assert coded["metrics"]["file_ratio"] > 8
    assert coded["accuracy"] >= dense["accuracy"] - 0.03
    assert coded["nonzeros"] <= pruned["nonzeros"]
    sizes = coded["metrics"]["sizes"]["bytes"]
    assert sizes["dense"] > sizes["csr"] > sizes["indexed"] > sizes["huffman"] >= sizes["file"]


def test_the_network_is_the_one_in_the_file(finished):
    _, workdir, report = finished
    params = treelib.flatten(
        coding.decompress((workdir / "seed0/coded/compressed.cnnz").read_bytes())
    )
    with np.load(workdir / "seed0/coded/network/arrays.npz") as file:
        saved = dict(file)
    assert saved
    for path, leaf in params.items():
        match = [v for k, v in saved.items() if k.endswith(path)]
        assert len(match) == 1, (path, list(saved))
        np.testing.assert_array_equal(match[0], leaf)


def test_a_wrong_glob_is_refused_before_any_work(finished, tmp_path):
    config, _, _ = finished
    config = config.copy_and_resolve_references()
    for field, value in (("include", ("conv/**",)), ("bits", {"conv/**": 3})):
        changed = config.copy_and_resolve_references()
        stages = {"coded": DeepCompression(**{field: value})}
        changed = pipeline.config_dict(
            "demo",
            model=pipeline.ModelSpec("plain_mlp", {"hidden": (48, 24)}),
            data=pipeline.DataConfig("digits", data_dir=config.data.data_dir),
            stages=stages,
        )
        with pytest.raises(ValueError, match="matches nothing"):
            pipeline.run(changed, tmp_path / field, progress=False)


def test_every_model_layout_packs(tmp_path):
    """Integer keys of lists, BatchNorm: a coded tree of a registry model comes back as it was."""
    from cnnjax import models

    shape = models.abstract("resnet20_cifar", num_classes=10)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda a: rng.normal(size=a.shape).astype("f4"),
        nnx.to_pure_dict(nnx.state(shape, nnx.Param)),
    )
    coded = coding.share(params, 3, iterations=2, init="density")
    out = coding.decompress(coding.pack(coded))
    assert jax.tree.structure(out) == jax.tree.structure(params)
    expected = treelib.flatten(coding.expand(coded))
    assert all(v.tobytes() == expected[k].tobytes() for k, v in treelib.flatten(out).items())
