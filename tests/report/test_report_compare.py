"""Networks side by side: figures against NumPy and the counting rule; times only as figures."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

from cnnjax import coding, report


class Net(nnx.Module):
    """One convolution and a dense layer."""

    def __init__(self, width, *, rngs):
        self.a = nnx.Conv(1, width, (3, 3), rngs=rngs)
        self.fc = nnx.Linear(width, 7, rngs=rngs)

    def __call__(self, x):
        return self.fc(jax.nn.relu(self.a(x)).mean((1, 2)))


@pytest.fixture(scope="module")
def networks():
    return {"wide": Net(8, rngs=nnx.Rngs(0)), "narrow": Net(2, rngs=nnx.Rngs(1))}


@pytest.fixture(scope="module")
def data():
    draw = np.random.default_rng(0)
    return draw.normal(size=(70, 6, 6, 1)).astype(np.float32), draw.integers(0, 7, 70)


@pytest.mark.method("evaluation_report")
def test_all_figures_of_two_networks(networks, data):
    images, labels = data
    wide = nnx.to_pure_dict(nnx.state(networks["wide"], nnx.Param))
    file = coding.pack(coding.share(wide, {"**/kernel": 2}, key=jax.random.key(0)))
    rows = report.compare(networks, images, labels, batches=(1, 4), calls=3, coded={"wide": file})
    for name, model in networks.items():
        row, logits = rows[name], np.asarray(model(images))
        order = np.argsort(-logits, axis=1)
        assert row["top1"] == np.mean(order[:, 0] == labels)
        assert row["top5"] == pytest.approx(np.mean((order[:, :5] == labels[:, None]).any(1)))
        width = 8 if name == "wide" else 2
        assert row["macs"] == 36 * 9 * width + 7 * width
        assert row["params"] == 9 * width + width + 7 * width + 7
        assert row["energy"]["joules"] > 0
        for batch in (1, 4):
            times = row["latency"][batch]
            assert 0 < times["best"] <= times["median"] <= times["p90"]
            assert times["throughput"] == batch / times["median"]
            ours, first = times["median"], rows["wide"]["latency"][batch]["median"]
            assert times["speedup"] == first / ours
    assert rows["narrow"]["top1_change"] == rows["narrow"]["top1"] - rows["wide"]["top1"]
    assert rows["narrow"]["params_ratio"] == 143 / 41
    assert rows["wide"]["coded"]["file"] == len(file)
    assert "coded" not in rows["narrow"]
    lines = report.comparison_table(rows).splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("wide")
    assert "1.00x" in lines[2]


def test_without_labels_and_energy(networks, data):
    rows = report.compare(networks, data[0], batches=(2,), calls=1, energy=False)
    assert "top1" not in rows["wide"]
    assert "energy" not in rows["wide"]
    assert " - " in report.comparison_table(rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"networks": {}}, "at least one network"),
        ({"batches": (1, 100)}, r"take \(1, 100\) images, got images of shape \(70, 6, 6, 1\)"),
        ({"labels": np.zeros(3, int)}, r"70 images but labels of shape \(3,\)"),
        ({"coded": {"wider": b""}}, r"coded holds \['wider'\]"),
        ({"calls": 0}, "calls must be >= 1 and warmup >= 0, got 0"),
    ],
)
def test_bad_input(networks, data, change, message):
    arguments = {"networks": networks, "images": data[0], "batches": (1,), "energy": False} | change
    with pytest.raises(ValueError, match=message):
        report.compare(**arguments)
