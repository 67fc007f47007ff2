"""Configurations: round trips, overrides, and errors that suggest the right key."""

from __future__ import annotations

import dataclasses

import pytest

from cnnjax import pipeline
from cnnjax.data import Augment
from cnnjax.pipeline import registry
from cnnjax.pipeline.stages import Prune, Train


def make(**changes):
    return pipeline.config_dict(
        "demo",
        model=pipeline.ModelSpec("plain_mlp", {"hidden": (12,)}),
        data=pipeline.DataConfig("digits", augment=Augment(pad=1)),
        # not in alphabetical order: stages keep theirs
        stages={"zero": Train(), "half": Prune(sparsity={"head/*": 0.5}), "all": Prune()},
        **changes,
    )


def test_round_trip_keeps_everything_and_the_order():
    config = make(seeds=(3, 1))
    run = pipeline.from_config(config)
    assert list(run.stages) == ["zero", "half", "all"]
    assert run.stages["half"].sparsity == {"head/*": 0.5}
    assert run.seeds == (3, 1)
    assert run.data.augment == Augment(pad=1)
    assert run.model.fields == {"hidden": (12,)}
    again = pipeline.from_config(pipeline.to_plain(run))
    assert again == run


def test_overrides_reach_any_setting():
    config = make()
    pipeline.apply_overrides(
        config,
        [
            ("stages.all.sparsity", "0.95"),
            ("stages.all.recipe.epochs", "3"),
            ("stages.zero.recipe.optimizer.clip_norm", "1e-1"),
            ("stages.zero.recipe.optimizer.name", "sgd"),
            ("data.augment.flip", "true"),
            ("data.data_dir", "/some/where"),
            ("seeds", "(4, 5)"),
            ("model.fields.hidden", "(7, 7)"),
        ],
    )
    run = pipeline.from_config(config)
    assert run.stages["all"].sparsity == 0.95
    assert run.stages["all"].recipe.epochs == 3.0
    assert run.stages["zero"].recipe.optimizer.clip_norm == 0.1
    assert run.stages["zero"].recipe.optimizer.name == "sgd"
    assert run.data.augment.flip is True
    assert run.data.data_dir == "/some/where"
    assert run.seeds == (4, 5)
    assert run.model.fields["hidden"] == (7, 7)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("stages.all.sparsty", "unknown config key stages.all.sparsty. Did you mean 'sparsity'"),
        ("stages.al.sparsity", "unknown config key stages.al. Did you mean 'all'"),
        ("dta.name", "unknown config key dta. Did you mean 'data'"),
        ("sparsity", "unknown config key sparsity. Did you mean 'stages.half.sparsity'"),
        ("stages.zero.recipe", "is a group of settings; set one of stages.zero.recipe.epochs"),
        ("name.first", "config key name is a value"),
    ],
)
def test_typos_in_overrides_are_errors_with_a_suggestion(key, message):
    with pytest.raises(ValueError) as error:
        pipeline.apply_overrides(make(), [(key, "0.5")])
    assert message in str(error.value)


def edit(path, value):
    plain = pipeline.to_plain(pipeline.from_config(make()))
    node = plain
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    return plain


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("stages", "all", "sparsty"), 0.5, "stages.all.sparsty. Did you mean 'sparsity'"),
        (("stages", "all", "stage"), "prun", "unknown stage 'prun'. Did you mean 'prune'"),
        (("stages", "all", "sparsity"), 1.2, "stages.all: final sparsity must lie in [0, 1)"),
        (("stages", "all", "sparsity"), "x", "config key stages.all.sparsity must be"),
        (("stages", "all", "cuts"), 2.5, "config key stages.all.cuts must be int, got float 2.5"),
        (("stages", "all", "method"), "gradul", "unknown method 'gradul'. Did you mean 'gradual'"),
        (("stages", "all", "recipe", "epochs"), -1, "epochs must be positive"),
        (("stages", "zero", "recipe", "optimizer", "name"), "adm", "Did you mean 'adam'"),
        (("data", "augment", "pad"), -1, "pad must be >= 0"),
        (("data", "augment", "pad"), True, "config key data.augment.pad must be int, got bool"),
        (("seeds",), (1, 1), "seeds must be distinct"),
        (("stages",), {}, "at least one stage"),
    ],
)
def test_bad_values_are_named(path, value, message):
    with pytest.raises((ValueError, TypeError)) as error:
        pipeline.from_config(edit(path, value))
    assert message in str(error.value)


def test_missing_key_is_named():
    with pytest.raises(ValueError, match="missing config key name"):
        pipeline.from_config({"stages": {"train": {}}})


def test_config_files(tmp_path, root):
    files = [f for f in (root / "configs").glob("*.py") if "def get_config" in f.read_text()]
    assert len(files) >= 3
    for file in files:
        run = pipeline.from_config(pipeline.load_config(file))
        assert run.name == file.stem
    with pytest.raises(FileNotFoundError, match=r"quickstrat.py. Did you mean .*quickstart.py"):
        pipeline.load_config(root / "configs" / "quickstrat.py")
    empty = tmp_path / "empty.py"
    empty.write_text("x = 1\n")
    with pytest.raises(ValueError, match=r"defines no get_config\(\)"):
        pipeline.load_config(empty)


def test_registering_stages(monkeypatch):
    monkeypatch.setattr(registry, "_STAGES", dict(registry._STAGES))

    @dataclasses.dataclass(frozen=True)
    class Halve:
        ratio: float = 0.5

        def run(self, network, context):
            return pipeline.Outcome(network)

    assert pipeline.stage("halve")(Halve) is Halve
    assert "halve" in pipeline.names()
    built = pipeline.from_config({"name": "x", "stages": {"halve": {"ratio": 1}}})
    assert built.stages["halve"] == Halve(1.0)
    with pytest.raises(ValueError, match="already registered"):
        pipeline.stage("train")(Halve)

    class Loose:
        def run(self, network, context): ...

    with pytest.raises(ValueError, match="must be a frozen dataclass"):
        pipeline.stage("loose")(Loose)
