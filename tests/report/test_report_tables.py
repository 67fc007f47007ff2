"""Counts, tables, result files, headers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cnnjax import models, pruning, report


def record(error=0.016, reduced=False):
    def same(v):
        return {"mean": v, "min": v, "max": v}

    stage = {
        "name": "pruned",
        "kind": "Prune",
        "error": {"mean": error, "min": error - 0.001, "max": error + 0.001},
        "nonzeros": same(22211.0),
        "compression": same(12.0),
        "seconds": same(61.0),
    }
    return {
        "format": report.FORMAT,
        "name": "demo",
        "seeds": [0, 1],
        "reduced": reduced,
        "stages": [stage],
        "expected": {"pruned": {"error": 0.0159, "compression": 12.0, "source": "the paper"}},
        "environment": {"cpu_cores": 2, "devices": 1, "device": "cpu", "jax": "0"},
    }


def test_measure_of_lenet_300_100_and_lenet_5():
    for name, params, macs in (
        ("lenet_300_100", 266_610, 266_200),
        ("lenet_5_caffe", 431_080, 2_293_000),
    ):
        shape = models.abstract(name)
        graphdef, state = nnx.split(shape)
        draw = np.random.default_rng(0).uniform
        state = jax.tree.map(
            lambda s, draw=draw: jnp.asarray(draw(0.5, 1.0, s.shape).astype(np.float32)), state
        )
        params_ = nnx.to_pure_dict(state)
        mask = pruning.magnitude_mask(params_, 0.9, scope="layer")
        nnx.replace_by_pure_dict(state, jax.device_get(pruning.apply_mask(params_, mask)))
        model = nnx.merge(graphdef, state)
        got = report.measure(model, jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32))
        assert (got["params"], got["macs"], got["bytes"]) == (params, macs, 4 * params)
        kept = {k: int(np.sum(v["kernel"])) for k, v in mask.items()}
        positions = {"conv1": 24 * 24, "conv2": 8 * 8}
        assert got["effective_macs"] == sum(n * positions.get(k, 1) for k, n in kept.items())
        biases = sum(v["bias"].size for v in params_.values())
        assert got["nonzeros"] == sum(kept.values()) + biases
        assert got["compression"] == params / got["nonzeros"]
        # CSR by hand: (4 + 2) bytes a value, 4 bytes a row pointer
        csr = sum(
            min(
                4 * v["kernel"].size,
                6 * kept[k] + 4 * (v["kernel"].size // v["kernel"].shape[-1] + 1),
            )
            for k, v in params_.items()
        )
        assert got["sparse_bytes"] == csr + 4 * biases


def test_summary_is_mean_min_and_max():
    runs = [
        {"seed": s, "stages": [{"name": "a", "kind": "K", "error": e, "curve": [], "ok": True}]}
        for s, e in ((0, 0.1), (1, 0.4))
    ]
    assert report.summarize(runs) == [
        {"name": "a", "kind": "K", "error": {"mean": 0.25, "min": 0.1, "max": 0.4}}
    ]


def test_tables_align_and_escape():
    text = report.text_table(("name", "value"), [("a", 1), ("long", 22)])
    assert text.split("\n") == ["name  value", "-----------", "a         1", "long     22"]
    assert report.markdown_table(("a|b", "c"), [(1, 2)]).split("\n") == [
        "| a\\|b | c |",
        "| --- | ---: |",
        "| 1 | 2 |",
    ]
    with pytest.raises(ValueError, match="a row has 1 cells, the header 2"):
        report.text_table(("a", "b"), [(1,)])


def test_results_table_shows_published_beside_measured():
    lines = report.results_table([record(), record(reduced=True)]).split("\n")
    assert "| demo: pruned | 1.60 (1.50-1.70) | 1.59 | 12.00x | 12x | 22,211 | 2 | full |" in lines
    assert lines[-1].endswith("| reduced |")


def test_result_files_round_trip_and_are_checked(tmp_path):
    path = tmp_path / "results" / "demo.json"
    report.write_result(record(), path)
    assert report.read_result(path) == record()
    assert [p.name for p in path.parent.iterdir()] == ["demo.json"]
    path.write_text('{"name": 1}')
    with pytest.raises(ValueError, match="is not a run's result: its format is None"):
        report.read_result(path)


def test_headers_are_written_between_the_markers(tmp_path):
    config = tmp_path / "demo.py"
    config.write_text('"""Doc."""\n\n# [measured]\n# old\n# [/measured]\n\nx = 1\n')
    assert report.update_header(config, record(), dry=True)
    assert "# old" in config.read_text()
    assert report.update_header(config, record())
    text = config.read_text()
    assert "# pruned: error 1.60 (1.50-1.70) %, 22.21k non-zeros, 12.00x\n" in text
    assert "#   published: 1.59 % (the paper)\n" in text
    assert "# old" not in text
    assert text.startswith('"""Doc."""\n\n# [measured]\n')
    assert text.endswith("# [/measured]\n\nx = 1\n")
    assert not report.update_header(config, record())
    config.write_text("x = 1\n")
    with pytest.raises(ValueError, match="has no lines"):
        report.update_header(config, record())


def test_curve_needs_points(tmp_path):
    result = {
        "name": "n",
        "model": "m",
        "data": "d",
        "runs": [{"seed": 0, "stages": [{"name": "a", "curve": [], "accuracy": 1.0}]}],
    }
    assert not report.plot_curve(result, tmp_path / "c.png")
    assert not list(tmp_path.iterdir())


def test_environment_names_kinds_not_machines():
    env = report.environment()
    assert env["devices"] == jax.device_count()
    import platform

    assert platform.node() not in map(str, env.values())


def test_result_files_name_no_folder():
    from cnnjax.report.results import _without_places

    config = {"stages": {"a": {"weights": "/home/me/w.npz", "sizes": (1, 2)}}, "note": "a/b"}
    kept = _without_places(config)
    assert kept == {"stages": {"a": {"weights": "w.npz", "sizes": [1, 2]}}, "note": "a/b"}


def test_surgery_figures_stand_in_a_table_of_their_own_and_in_the_header(tmp_path):
    figures = {"accuracy_before": 0.9, "accuracy_after_shrinking": 0.25, "macs_share": 0.5,
               "accuracy_after_fine_tuning": 0.875, "params_share": 0.4,
               "speed_up": 1.75}  # fmt: skip
    one = record()
    name = one["stages"][0]["name"]
    assert report.surgery_table([one]) == ""
    one["per_seed"] = [{name: figures}, {name: figures | {"accuracy_after_shrinking": 0.75}}]
    head, _, row = report.surgery_table([one]).split("\n")
    assert [c.strip() for c in head.strip("| ").split("|")][1:] == [
        "accuracy % before", "shrunk", "recalibrated", "fine-tuned", "MACs left", "parameters left",
        "measured speed-up",
    ]  # fmt: skip
    assert row.endswith("| 90.00 | 50.00 (25.00-75.00) |  | 87.50 | 0.50x | 0.40x | 1.75x |")
    file = tmp_path / "c.py"
    file.write_text("# [measured]\n# [/measured]\n")
    assert report.update_header(file, one)
    assert "shrunk 50.00 (25.00-75.00), fine-tuned 87.50\n#   MACs left 0.50x" in file.read_text()
    one["per_seed"][1] = {name: {k: v + 0.01 for k, v in figures.items()}}
    report.update_header(file, one)
    assert "(87.50-88.50)" in file.read_text()
    assert max(map(len, file.read_text().splitlines())) <= 100
