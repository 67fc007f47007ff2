"""The main command, as a user types it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

SHORT = [
    "--config.stages.dense.recipe.epochs=3",
    "--config.stages.dense.recipe.eval_every=0",
    "--config.stages.pruned.recipe.epochs=1",
    "--config.stages.pruned.cuts=2",
]


@pytest.fixture(scope="module")
def script(root):
    def load(name):
        spec = importlib.util.spec_from_file_location(f"_{name}", root / "scripts" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def test_quickstart_in_a_process_of_its_own(root, tmp_path):
    env = {
        **os.environ,
        "TFDS_DATA_DIR": str(tmp_path / "tfds"),
        "XLA_FLAGS": "",
        "JAX_PLATFORMS": "cpu",
    }
    command = [
        sys.executable,
        "scripts/run.py",
        "--config=configs/quickstart.py",
        f"--workdir={tmp_path / 'run'}",
        f"--result={tmp_path / 'result.json'}",
        f"--compile_cache={tmp_path.parent / 'xla'}",
        *SHORT,
    ]
    first = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=300)
    assert first.returncode == 0, first.stderr
    assert "accuracy %" in first.stdout
    for name in ("config.json", "report.json", "report.txt", "curve.png"):
        assert (tmp_path / "run" / name).stat().st_size > 100
    assert (tmp_path / "run" / "seed0" / "dense" / "metrics.jsonl").exists()
    assert (tmp_path / "run" / "seed0" / "dense" / "checkpoints").is_dir()
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["summary"][0]["params"]["mean"] == 38_282
    assert report["summary"][1]["accuracy"]["mean"] > 0.5
    assert report["summary"][1]["nonzeros"]["mean"] < 0.11 * 38_282
    assert json.loads((tmp_path / "result.json").read_text())["reduced"] is True
    second = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=300)
    assert second.returncode == 0, second.stderr
    assert "This run is complete" in second.stdout


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--config.stages.pruned.sparsty=0.5"], "Did you mean 'sparsity'"),
        (["--config.stages.pruned.sparsity=1.2"], "must lie in [0, 1), got 1.2"),
        (["--config.model.name=plain_cn"], "Did you mean 'plain_cnn'"),
        (["--config.data.name=mnst", "--data_dir={tmp}"], "Did you mean 'mnist'"),
        (["--workdir=/proc/nowhere"], "work folder cannot be written"),
    ],
)
def test_mistakes_exit_with_two_and_one_line(script, root, tmp_path, capsys, argv, message):
    before = set(tmp_path.iterdir())
    argv = [a.format(tmp=tmp_path / "none") for a in argv]
    code = script("run").main(
        [
            f"--config={root / 'configs' / 'quickstart.py'}",
            f"--workdir={tmp_path / 'run'}",
            f"--data_dir={tmp_path.parent / 'tfds'}",
            "--compile_cache=off",
            *argv,
        ]
    )
    captured = capsys.readouterr()
    assert code == 2
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--config=x.py", "--workdirr=/tmp"], "Did you mean '--workdir'"),
        (["--config=x.py", "--config.seeds"], "needs a value"),
        ([], "required: --config"),
    ],
)
def test_bad_flags(script, capsys, argv, message):
    with pytest.raises(SystemExit) as stop:
        script("run").parse(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_config_file_that_is_not_there(script, root, capsys):
    assert script("run").main([f"--config={root}/configs/quickstrt.py"]) == 2
    assert "quickstart.py" in capsys.readouterr().err


def test_headers_match_the_result_files(script, capsys):
    assert script("update_results").main(["--check"]) == 0, capsys.readouterr().out
