"""Trains, compresses and reports as a config file says.

    python scripts/run.py --config=configs/quickstart.py
    python scripts/run.py --config=configs/mnist_lenet_5.py --workdir=runs/lenet5 \
        --config.data.data_dir=~/tensorflow_datasets --config.seeds="(0,)"

Any setting of the config can be replaced by ``--config.KEY=VALUE``; a key that does not exist is an
error that suggests the right one. The work folder holds everything (config, metrics, checkpoints,
report.json, curve.png); running again resumes, or says that the run is complete.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

FLAGS = ("--config", "--workdir", "--data_dir", "--result", "--merge", "--compile_cache", "--quiet")


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    """Splits the command line into flags and ``--config.KEY=VALUE`` overrides.

    Raises:
      SystemExit: 2, with the nearest flag, for an unknown argument.
    """
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="config file, e.g. configs/quickstart.py")
    parser.add_argument("--workdir", help="default: runs/<name of the config file>")
    parser.add_argument("--data_dir", help="short for --config.data.data_dir")
    parser.add_argument("--result", help="also write a result file (JSON) here")
    parser.add_argument(
        "--merge", action="store_true",
        help="keep the branches in --result that this run left out (only=...)",
    )  # fmt: skip
    parser.add_argument(
        "--compile_cache", help="folder of JAX's compilation cache, or 'off'", default=None
    )
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--distributed", action="store_true", help="one process of several hosts")
    plain, overrides = [], []
    rest = list(argv)
    while rest:
        arg = rest.pop(0)
        if arg.startswith("--config."):
            key, sign, value = arg[len("--config.") :].partition("=")
            if not sign:
                if not rest:
                    parser.error(f"{arg} needs a value: {arg}=VALUE")
                value = rest.pop(0)
            overrides.append((key, value))
        else:
            plain.append(arg)
    flags, unknown = parser.parse_known_args(plain)
    if unknown:
        from cnnjax.errors import did_you_mean

        name = unknown[0].split("=")[0]
        parser.error(f"unknown argument {unknown[0]}.{did_you_mean(name, FLAGS)}")
    if flags.data_dir is not None:
        overrides.append(("data.data_dir", flags.data_dir))
    return flags, overrides


def main(argv: Sequence[str] | None = None) -> int:
    """Runs; returns the exit code."""
    flags, overrides = parse(sys.argv[1:] if argv is None else argv)
    from cnnjax import data, pipeline, report, training

    try:
        config = pipeline.load_config(flags.config)
        pipeline.apply_overrides(config, overrides)
        cache = flags.compile_cache
        training.enable_compilation_cache(False if cache == "off" else cache)
        if flags.distributed:
            training.initialize_distributed()
        workdir = flags.workdir or pathlib.Path("runs") / pathlib.Path(flags.config).stem
        result = pipeline.run(config, workdir, progress=not flags.quiet)
        if flags.result:
            own = {"data.data_dir", "data.workers"}
            changed = {k for k, _ in overrides if not k.endswith(".only")} - own
            record = report.result_record(result, reduced=bool(changed))
            if flags.merge and pathlib.Path(flags.result).exists():
                record = report.merge_branches(report.read_result(flags.result), record)
            report.write_result(record, flags.result)
    except (ValueError, TypeError, OSError, data.DatasetNotPreparedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except training.NonFiniteLossError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
