"""The compressed file: exact round trips over random trees, sizes, refusals, the command line."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from cnnjax import coding, training
from cnnjax import tree as treelib
from cnnjax.coding import container, tensors

pytestmark = pytest.mark.method("deep_compression")


def leaf_bytes(node):
    parts = (
        [getattr(node, f.name) for f in dataclasses.fields(node)]
        if dataclasses.is_dataclass(node)
        else [node]
    )
    return [
        (np.asarray(p).dtype.name, np.shape(p), np.asarray(p).tobytes())
        if isinstance(p, np.ndarray)
        else p
        for p in parts
    ]


def assert_same_coded(a, b):
    a, b = container.coded_leaves(a), container.coded_leaves(b)
    assert list(a) == list(b)
    for path in a:
        assert leaf_bytes(a[path]) == leaf_bytes(b[path]), path


def random_shared(rng):
    rank = rng.integers(0, 5)
    shape = tuple(int(n) for n in rng.integers(0 if rng.random() < 0.1 else 1, 9, rank))
    k = int(rng.choice([0, 1, 2, 5, 32, 255, 256, 3000]))
    density = rng.choice([0.0, 0.02, 0.1, 0.5, 1.0])
    codes = rng.integers(1, k + 1, shape) if k else np.zeros(shape, int)
    codes = codes * (rng.random(shape) < density)
    book = rng.normal(size=k).astype("f4")
    if k > 1 and rng.random() < 0.3:
        book[0] = -0.0
    if rng.random() < 0.5:
        book = book.astype("f2").astype("f4")
    small = np.uint8 if k < 256 else np.uint16
    dtype = str(rng.choice(["float32", "bfloat16", "float16", "float64"]))
    return coding.Shared(book, np.asarray(codes).astype(small), dtype)


def random_array(rng):
    shape = tuple(int(n) for n in rng.integers(0, 7, rng.integers(0, 4)))
    name = str(rng.choice(tensors.DTYPES))
    if name == "bool":
        return np.asarray(rng.random(shape) < 0.5)
    if "int" in name:
        found = jnp.iinfo(name)
        return rng.integers(found.min, found.max, shape, dtype=name, endpoint=True)
    values = np.asarray(rng.normal(size=shape) * (rng.random(shape) < rng.choice([0.1, 1.0])))
    values = np.where(rng.random(shape) < 0.1, -0.0, values)
    return np.asarray(values).astype(jnp.dtype(name))


def random_uniform(rng):
    shape = tuple(int(n) for n in rng.integers(1, 8, rng.integers(1, 4)))
    w = rng.normal(size=shape) * (rng.random(shape) < rng.choice([0.1, 1.0]))
    bits, symmetric = int(rng.integers(2, 13)), bool(rng.random() < 0.5)
    axis = None if rng.random() < 0.3 else int(rng.integers(0, len(shape)))
    low, high = coding.uniform.code_range(bits, symmetric)
    form = () if axis is None else (shape[axis],)
    kind = ("int" if symmetric else "uint") + ("8" if bits <= 8 else "16")
    zero = np.zeros(form, "i4") if symmetric else rng.integers(low, high + 1, form).astype("i4")
    codes = np.clip(np.round(w * high / 3), low, high).astype(kind)
    scale = np.asarray(rng.random(form), "f4")
    return coding.Uniform(codes, scale, np.asarray(zero), bits, axis, symmetric, "float32")


@given(st.integers(0, 2**32 - 1), st.sampled_from(["auto", "fixed", "huffman", "ans"]))
@settings(max_examples=80, deadline=None)
def test_random_trees_come_back_bit_for_bit(seed, method):
    rng = np.random.default_rng(seed)
    makers = [random_shared, random_array, random_uniform]
    tree = {
        f"net{i}": {"w": makers[rng.integers(3)](rng), 3: {"b": makers[rng.integers(3)](rng)}}
        if i % 2
        else {j: makers[rng.integers(3)](rng) for j in range(rng.integers(1, 3))}
        for i in range(rng.integers(0, 4))
    }
    # integer and string keys do not mix in one dict: NNX does not do so either
    tree = {k: {str(a): b for a, b in v.items()} if "w" in v else v for k, v in tree.items()}
    gap_bits = None if rng.random() < 0.5 else int(rng.integers(1, 17))
    blob = coding.pack(tree, metadata={"seed": seed}, method=method, gap_bits=gap_bits)
    contents = coding.unpack(blob)
    assert contents.metadata == {"seed": seed}
    assert_same_coded(contents.coded, tree)
    assert coding.pack(contents.coded, metadata={"seed": seed}, method=method) != b""
    assert len(blob) == coding.report(blob).file_bytes


def pruned_net(seed=0, density=0.1):
    rng = np.random.default_rng(seed)

    def kernel(*shape):
        w = rng.normal(size=shape) * (rng.random(shape) < density)
        return w.astype("f4")

    return {
        "conv": {"kernel": kernel(5, 5, 8, 20), "bias": rng.normal(size=20).astype("f4")},
        "layers": {
            0: {"kernel": kernel(300, 100), "bias": rng.normal(size=100).astype("f4")},
            1: {"kernel": kernel(100, 10), "bias": np.zeros(10, "f4")},
        },
    }


def test_decompress_equals_the_quantized_parameters_bit_for_bit():
    params = pruned_net()
    config = coding.DeepCompression(bits=(("conv/**", 6), ("**", 4)))
    kept = {}

    def finetune(coded):
        kept["coded"] = coded
        return coded

    blob = coding.compress(params, config, finetune=finetune, metadata={"model": "net"})
    out = coding.decompress(blob)
    assert jax.tree.structure(out) == jax.tree.structure(params)
    expected = coding.expand(kept["coded"])
    for path, leaf in treelib.flatten(expected).items():
        assert np.asarray(treelib.flatten(out)[path]).tobytes() == np.asarray(leaf).tobytes(), path
        zeros = treelib.flatten(params)[path] == 0
        if path.endswith("kernel"):
            np.testing.assert_array_equal(np.asarray(leaf) == 0, zeros)

    @jax.jit
    def forward(params, x):
        hidden = jax.nn.relu(x @ params["layers"][0]["kernel"] + params["layers"][0]["bias"])
        return hidden @ params["layers"][1]["kernel"]

    x = np.random.default_rng(1).normal(size=(4, 300)).astype("f4")
    assert forward(out, x).tobytes() == forward(expected, x).tobytes()
    # through the device the look-up gives the same bits
    device = coding.expand(jax.tree.map(jnp.asarray, kept["coded"]))
    np.testing.assert_array_equal(device["conv"]["kernel"], expected["conv"]["kernel"])


def test_report_counts_every_byte_and_ratios_multiply():
    params = pruned_net()
    coded = coding.share(params, 4)
    blob = coding.pack(coded)
    report = coding.report(blob)
    assert report.file_bytes == len(blob) == report.total("file")
    assert report.total("dense") == 4 * treelib.count(params)
    assert math.prod(report.stage_ratios.values()) == pytest.approx(report.ratio)
    assert report.ratio == 4 * treelib.count(params) / len(blob)
    sizes = [report.total(stage) for stage in ("dense", "csr", "indexed", "huffman", "file")]
    assert sizes == sorted(sizes, reverse=True)
    row = next(t for t in report.tensors if t.path == "layers/0/kernel")
    kernel = params["layers"][0]["kernel"]
    nonzeros = int(np.count_nonzero(kernel))
    assert row.nonzeros == nonzeros
    assert row.csr == 8 * nonzeros + 4 * 301
    # oracle for the fixed-width stage: (codes + gaps) per entry at the best width, plus codebook
    gaps = {b: len(coding.relative_index.encode(kernel.ravel(), b)[0]) for b in tensors.GAP_BITS}
    fixed = min(n * (b + 5) for b, n in gaps.items()) / 8 + 4 * 16
    assert row.indexed == pytest.approx(fixed, rel=0.02, abs=12)
    assert "layers/0/kernel" in str(report)
    assert json.loads(json.dumps(report.as_dict()))["bytes"]["file"] == len(blob)
    with pytest.raises(ValueError, match="stage"):
        report.total("zip")


def test_entropy_coders_beat_fixed_widths_and_16_bit_tables_are_used():
    coded = coding.share(pruned_net(), 5)
    sizes = {m: len(coding.pack(coded, method=m)) for m in ("auto", "fixed", "huffman", "ans")}
    assert sizes["auto"] <= min(sizes.values())
    assert sizes["huffman"] < sizes["fixed"]
    narrow = coding.share(pruned_net(), 5, centroid_dtype="float16")
    assert len(coding.pack(narrow)) <= len(coding.pack(coded)) - 3 * 32 * 2 + 64
    dense = pruned_net(density=1.0)
    assert len(coding.pack(dense)) > 4 * treelib.count(dense)
    lossless = pruned_net(density=0.1)
    assert any((np.signbit(w) & (w == 0)).any() for w in jax.tree.leaves(lossless))
    blob = coding.pack(lossless)
    assert len(blob) < 0.17 * 4 * treelib.count(lossless)
    assert_same_coded(coding.unpack(blob).coded, lossless)


def test_known_bytes_do_not_change():
    """Version 1 files must stay readable: the header of a tiny file, byte for byte."""
    blob = coding.pack({"a": np.array([1.5, 0.0], "f4")})
    assert blob[:9] == b"\x89CNNZ\r\n\x1a\x01"
    assert hashlib.sha256(blob[:-32]).digest() == blob[-32:]
    payload = blob[-32 - 6 : -32]  # plain, float16, numbers
    assert payload == b"\x00\x01" + np.array([1.5, 0.0], "<f2").tobytes()


@pytest.mark.parametrize("value", [1.0, -0.0, 0.0, 0.1])
def test_equal_numbers_are_stored_once(value):
    tree = {"var": np.full((8, 125), value, "f4"), "count": np.full(1000, 7, "i4")}
    blob = coding.pack(tree)
    assert len(blob) < 160
    assert_same_coded(coding.unpack(blob).coded, tree)
    tree["var"][-1, -1] = -value  # 0.0 beside -0.0 is not the same number
    back = coding.unpack(coding.pack(tree)).coded["var"]
    assert np.asarray(back).tobytes() == tree["var"].tobytes()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_is_refused_everywhere(value):
    bad = np.array([1.0, value], "f4")
    with pytest.raises(ValueError, match="a/b.*NaN"):
        coding.pack({"a": {"b": bad}})
    with pytest.raises(ValueError, match="NaN"):
        coding.pack({"a": coding.Shared(bad, np.array([1, 2], np.uint8))})
    with pytest.raises(ValueError, match="NaN"):
        coding.pack({"a": coding.Uniform(np.ones(2, np.int8), bad[1:][0], np.int32(0))})


def test_what_cannot_be_stored_is_refused():
    with pytest.raises(ValueError, match="code 3 of a codebook of 2"):
        coding.pack({"a": coding.Shared(np.ones(2, "f4"), np.array([3], np.uint8))})
    with pytest.raises(TypeError, match="complex64"):
        coding.pack({"a": np.ones(2, np.complex64)})
    with pytest.raises(ValueError, match="gap_bits"):
        coding.pack({}, gap_bits=0)
    with pytest.raises(ValueError, match="method"):
        coding.pack({"a": coding.Shared(np.ones(2, "f4"), np.ones(2, np.uint8))}, method="zip")
    with pytest.raises(ValueError, match="not finite"):
        coding.compress(
            {"a": {"kernel": np.array([1e9], "f4")}},
            coding.DeepCompression(centroid_dtype="float16"),
        )


def test_files_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "net.cnnz"
    coding.save(path, coding.pack(pruned_net()))
    assert_same_coded(coding.load(path).coded, pruned_net())
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        coding.save(path, b"new")
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["net.cnnz"]
    with pytest.raises(coding.FormatError, match="max_bytes"):
        coding.load(path, max_bytes=100)


def test_codebooks_train_through_the_trainer():
    import optax

    rng = np.random.default_rng(0)
    teacher = rng.normal(size=(6, 3)).astype("f4")
    x = rng.normal(size=(256, 6)).astype("f4")
    y = np.argmax(x @ teacher, axis=1).astype("i4")
    model = nnx.Linear(6, 3, rngs=nnx.Rngs(0))
    params = {"kernel": (teacher * (np.abs(teacher) > 0.3)).astype("f4"), "bias": np.zeros(3, "f4")}
    coded = coding.share(params, 2, include="kernel")

    def data():
        while True:
            yield {"image": x, "label": y}

    tuned = coding.finetune_codebooks(model, coded, data(), optax.adam(0.05), steps=40)
    np.testing.assert_array_equal(tuned["kernel"].codes, coded["kernel"].codes)
    np.testing.assert_array_equal(
        np.asarray(coding.expand(tuned)["kernel"]) == 0, params["kernel"] == 0
    )

    def loss(coded):
        p = coding.expand(coded)
        return float(
            training.softmax_cross_entropy(
                jnp.asarray(x @ p["kernel"] + p["bias"]), jnp.asarray(y)
            ).mean()
        )

    assert loss(tuned) < loss(coded) - 0.02
    with pytest.raises(ValueError, match="reparam"):
        coding.codebook_hooks(coded, training.Hooks(reparam=lambda p, c: p))


# ---------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def cli(root):
    spec = importlib.util.spec_from_file_location(
        "compress_file", root / "scripts/compress_file.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "w.npz"
    np.savez(path, **treelib.flatten(pruned_net()))
    return path


def test_pack_info_unpack(cli, weights, tmp_path, capsys):
    packed, out = tmp_path / "w.cnnz", tmp_path / "out.npz"
    args = ["--bits", "conv/**=6", "**=4", "--metadata", '{"model": "net"}', "--others", "float16"]
    assert cli(["pack", str(weights), str(packed), *args]) == 0
    assert "times below float32" in capsys.readouterr().out
    assert cli(["info", str(packed)]) == 0
    text = capsys.readouterr().out
    assert "layers/0/kernel" in text
    assert '{"model": "net"}' in text
    assert cli(["info", str(packed), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"]["file"] == packed.stat().st_size
    assert cli(["unpack", str(packed), str(out)]) == 0
    expected = treelib.flatten(coding.decompress(packed.read_bytes()))
    with np.load(out) as found:
        assert set(found.files) == set(expected)
        assert all(found[n].tobytes() == expected[n].tobytes() for n in expected)


def test_lossless_and_uniform_packing(cli, weights, tmp_path):
    packed, out = tmp_path / "w.cnnz", tmp_path / "out.npz"
    assert cli(["pack", str(weights), str(packed)]) == 0
    assert cli(["unpack", str(packed), str(out)]) == 0
    with np.load(weights) as a, np.load(out) as b:
        assert all(a[n].tobytes() == b[n].tobytes() for n in a.files)
    assert cli(["pack", str(weights), str(packed), "--uniform", "8"]) == 0
    assert coding.load(packed).coded["conv"]["kernel"].bits == 8


def test_saved_models_go_in_and_out(cli, tmp_path):
    import cnnjax

    model = cnnjax.models.create("lenet_300_100", image_size=4, rngs=nnx.Rngs(0))
    cnnjax.save(tmp_path / "model", model)
    packed = tmp_path / "model.cnnz"
    assert cli(["pack", str(tmp_path / "model"), str(packed), "--bits", "3"]) == 0
    args = ["unpack", str(packed), str(tmp_path / "new"), "--into", str(tmp_path / "model")]
    assert cli(args) == 0
    new = nnx.to_pure_dict(nnx.state(cnnjax.load(tmp_path / "new"), nnx.Param))
    for path, leaf in treelib.flatten(coding.decompress(packed.read_bytes())).items():
        np.testing.assert_array_equal(treelib.flatten(new)[path], leaf)


def test_the_command_line_explains_failures(cli, weights, tmp_path, capsys):
    packed = tmp_path / "w.cnnz"
    assert cli(["pack", str(tmp_path / "none.npz"), str(packed)]) == 2
    assert "none.npz" in capsys.readouterr().err
    assert cli(["pack", str(weights), str(packed), "--bits", "4", "--include", "fc/**"]) == 2
    assert "'fc/**' matches nothing" in capsys.readouterr().err
    packed.write_bytes(b"hello")
    assert cli(["info", str(packed)]) == 2
    assert "not a cnnjax compressed file" in capsys.readouterr().err
    assert not (tmp_path / "w.cnnz.tmp").exists()


def test_the_script_runs_as_a_program(root):
    done = subprocess.run(
        [sys.executable, str(root / "scripts/compress_file.py"), "--help"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0
    assert "pack" in done.stdout
