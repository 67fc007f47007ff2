"""Relative indices, Huffman, ANS, streams (oracles: brute force, entropy, constriction)."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnnjax.coding import ans, bits, huffman, relative_index, streams
from cnnjax.coding.wire import FormatError, Reader


def entropy(freqs):
    p = np.asarray(freqs, float)
    p = p[p > 0] / p.sum()
    return float(-(p * np.log2(p)).sum())


def geometric(n, seed=0, p=0.3, top=63):
    return np.minimum(np.random.default_rng(seed).geometric(p, n) - 1, top)


# ---------------------------------------------------------------- relative indices


@pytest.mark.method("relative_index_coding")
def test_the_papers_example():
    flat = np.zeros(16, np.float32)
    flat[[1, 4, 15]] = [7, 8, 9]
    gaps, values = relative_index.encode(flat, 3)
    np.testing.assert_array_equal(gaps, [2, 3, 8, 3])
    np.testing.assert_array_equal(values, [7, 8, 0, 9])
    np.testing.assert_array_equal(relative_index.decode(gaps, values, 16), flat)


@pytest.mark.method("relative_index_coding")
@pytest.mark.parametrize("width", [1, 2, 5, 8])
@pytest.mark.parametrize(
    "flat",
    [
        np.zeros(40),
        np.zeros(0),
        np.ones(9),
        np.r_[np.zeros(33), 1.0],
        np.r_[1.0, np.zeros(33)],
        np.r_[np.zeros(8), 2.0, np.zeros(7), 3.0, np.zeros(300), 4.0, np.zeros(5)],
    ],
    ids=["zero", "empty", "full", "leading", "trailing", "mixed"],
)
def test_relative_round_trips(flat, width):
    gaps, values = relative_index.encode(flat, width)
    assert gaps.size == 0 or (gaps.min() >= 1 and gaps.max() <= 2**width)
    # oracle: the coder's rule as a loop
    expected, last = [], -1
    for position in np.flatnonzero(flat):
        d = position - last
        while d > 2**width:
            expected.append((2**width, 0.0))
            d -= 2**width
        expected.append((d, flat[position]))
        last = position
    assert [(g, v) for g, v in zip(gaps.tolist(), values.tolist())] == expected
    assert relative_index.decode(gaps, values, len(flat)).tobytes() == flat.tobytes()


@pytest.mark.method("relative_index_coding")
def test_expected_entries_and_the_best_width():
    assert relative_index.expected_entries(0.08, 5) == pytest.approx(1.0746, abs=1e-4)
    assert relative_index.expected_entries(0.09, 4) == pytest.approx(1.284, abs=1e-3)
    rng = np.random.default_rng(0)
    for density, width in ((0.08, 5), (0.09, 4)):
        flat = rng.random(400_000) < density
        gaps, _ = relative_index.encode(flat, width)
        expected = relative_index.expected_entries(density, width)
        assert len(gaps) / flat.sum() == pytest.approx(expected, rel=5e-3)
    # 90 % pruned: the measured minimum sits where the formula puts it
    flat = rng.random(200_000) < 0.1
    formula = [relative_index.expected_bits_per_weight(0.1, b, 5) for b in range(2, 9)]
    assert relative_index.best_bits(flat, 5) == 2 + int(np.argmin(formula))
    # LeNet-300-100 ip1: 8 % at 6+5 bits is 2.98 % of 32 bits with the codebook
    share = relative_index.expected_bits_per_weight(0.08, 5, 6) / 32 + 64 * 32 / (235_200 * 32)
    assert share == pytest.approx(0.0298, abs=1e-4)


@pytest.mark.method("relative_index_coding")
def test_relative_index_refuses_nonsense():
    with pytest.raises(ValueError, match="gap bits"):
        relative_index.encode(np.ones(3), 0)
    with pytest.raises(ValueError, match="flat"):
        relative_index.encode(np.ones((3, 3)), 4)
    with pytest.raises(ValueError, match="reach position"):
        relative_index.decode([4, 4], [1, 1], 7)
    with pytest.raises(ValueError, match="below 1"):
        relative_index.decode([0], [1], 7)
    with pytest.raises(ValueError, match="match"):
        relative_index.decode([1, 2], [1], 7)


# ---------------------------------------------------------------- Huffman


def brute_force_cost(freqs):
    """Smallest total length over all complete prefix codes (length vectors with Kraft <= 1)."""
    n = len(freqs)
    best = None
    for lengths in itertools.product(range(1, n + 1), repeat=n):
        if sum(2.0**-l for l in lengths) <= 1:  # noqa: E741
            cost = sum(f * l for f, l in zip(freqs, lengths))  # noqa: E741
            best = cost if best is None else min(best, cost)
    return best


@pytest.mark.method("huffman_coding")
@pytest.mark.parametrize(
    "freqs", [(1, 1), (5, 1, 1), (8, 4, 2, 1), (3, 3, 3, 3), (13, 8, 5, 3, 2), (1, 1, 1, 1, 1)]
)
def test_lengths_are_the_brute_force_optimum(freqs):
    lengths = huffman.lengths(freqs)
    assert (lengths * np.array(freqs)).sum() == brute_force_cost(freqs)
    assert huffman.kraft(lengths) == 1
    for limit in (3, 4):
        assert (huffman._limited(np.array(freqs), limit) * np.array(freqs)).sum() >= (
            lengths * np.array(freqs)
        ).sum()


@pytest.mark.method("huffman_coding")
def test_limited_lengths_are_the_brute_force_optimum():
    freqs = (100, 40, 10, 3, 1)
    for limit in (3, 4):
        best = min(
            sum(f * n for f, n in zip(freqs, lengths))
            for lengths in itertools.product(range(1, limit + 1), repeat=5)
            if sum(2.0**-n for n in lengths) <= 1
        )
        lengths = huffman.lengths(freqs, max_length=limit)
        assert lengths.max() <= limit
        assert (lengths * np.array(freqs)).sum() == best


@pytest.mark.method("huffman_coding")
@given(st.lists(st.integers(0, 10_000), min_size=2, max_size=70))
@settings(max_examples=60, deadline=None)
def test_mean_length_is_within_a_bit_of_the_entropy(freqs):
    freqs = np.array(freqs)
    lengths = huffman.lengths(freqs)
    used = freqs > 0
    assert ((lengths > 0) == used).all()
    if used.sum() >= 2:
        mean = (lengths * freqs).sum() / freqs.sum()
        assert entropy(freqs) - 1e-9 <= mean < entropy(freqs) + 1
        assert huffman.kraft(lengths) == 1
        # canonical codes: prefix-free and ordered
        codes = huffman.canonical(lengths)
        words = [format(c, f"0{n}b") for c, n in zip(codes.tolist(), lengths.tolist()) if n]
        assert len(set(words)) == len(words)
        ordered = sorted(words)
        assert not any(b.startswith(a) for a, b in itertools.pairwise(ordered))


@pytest.mark.method("huffman_coding")
def test_geometric_symbols_reach_the_known_mean_length():
    symbols = geometric(5000, p=0.3, top=10_000)
    freqs = np.bincount(symbols)
    mean = (huffman.lengths(freqs) * freqs).sum() / 5000
    assert entropy(freqs) == pytest.approx(2.917, abs=0.06)  # of other draws
    assert entropy(freqs) <= mean < entropy(freqs) + 0.06


@pytest.mark.method("huffman_coding")
def test_one_symbol_takes_one_bit_and_ties_are_deterministic():
    lengths = huffman.lengths([0, 9, 0])
    np.testing.assert_array_equal(lengths, [0, 1, 0])
    data, blocks = huffman.encode(np.ones(9, int), lengths)
    assert len(data) == 2
    np.testing.assert_array_equal(huffman.decode(data, lengths, 9, blocks), np.ones(9))
    np.testing.assert_array_equal(huffman.lengths([2] * 6), huffman.lengths([2] * 6))
    assert huffman.lengths([0, 0]).sum() == 0


@pytest.mark.method("huffman_coding")
def test_fibonacci_counts_are_length_limited():
    freqs = [1, 1]
    while len(freqs) < 40:
        freqs.append(freqs[-1] + freqs[-2])
    assert huffman.lengths(freqs, max_length=None).max() == 39
    limited = huffman.lengths(freqs)
    assert limited.max() == huffman.MAX_LENGTH
    assert huffman.kraft(limited) == 1
    with pytest.raises(ValueError, match="do not fit"):
        huffman.lengths(np.ones(9), max_length=3)


@pytest.mark.method("huffman_coding")
@pytest.mark.parametrize("n", [0, 1, 2, 2047, 2048, 2049, 5000])
def test_huffman_round_trips_at_block_edges(n):
    symbols = geometric(n, seed=n)
    lengths = huffman.lengths(np.bincount(symbols, minlength=64))
    data, blocks = huffman.encode(symbols, lengths)
    np.testing.assert_array_equal(huffman.decode(data, lengths, n, blocks), symbols)
    # oracle: the bit string written out
    codes = huffman.canonical(lengths)
    text = "".join(format(codes[s], f"0{lengths[s]}b") for s in symbols)
    padded = text + "0" * (-len(text) % 8)
    assert data == bytes(int(padded[i : i + 8], 2) for i in range(0, len(padded), 8))


@pytest.mark.method("huffman_coding")
def test_huffman_refuses_nonsense():
    with pytest.raises(ValueError, match="no code"):
        huffman.encode([0, 1], [1, 0])
    with pytest.raises(ValueError, match="outside"):
        huffman.encode([0, 5], [1, 1])
    with pytest.raises(ValueError, match="counts"):
        huffman.lengths([-1, 2])
    for lengths in ([1, 1, 1], [2, 2], [0, 0], [30, 1]):
        with pytest.raises(ValueError, match="code"):
            huffman.decode(b"\0\0", lengths, 9, [9])
    data, blocks = huffman.encode([0, 1, 2, 2], [2, 2, 1])
    with pytest.raises(ValueError, match="damaged|hold"):
        huffman.decode(data, [2, 2, 1], 4, blocks + 1)


# ---------------------------------------------------------------- bits, ANS, streams


@given(st.integers(0, 32), st.integers(0, 300), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_fixed_width_round_trips(width, n, seed):
    values = np.random.default_rng(seed).integers(0, 2**width, n, dtype=np.uint64)
    data = bits.pack_fixed(values, width)
    assert len(data) == (n * width + 7) // 8
    np.testing.assert_array_equal(bits.unpack_fixed(data, width, n), values)


def test_variable_width_packing_equals_a_bit_string():
    rng = np.random.default_rng(3)
    lengths = rng.integers(0, 33, 700)
    codes = np.array([rng.integers(0, 2**n) if n else 0 for n in lengths.tolist()], np.uint64)
    data, total = bits.pack_codes(codes, lengths)
    text = "".join(format(c, f"0{n}b") for c, n in zip(codes.tolist(), lengths.tolist()) if n)
    assert total == len(text)
    assert data == int(text + "0" * (-total % 8), 2).to_bytes((total + 7) // 8, "big")


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=60), st.integers(6, 14))
@settings(max_examples=60, deadline=None)
def test_quantized_frequencies(freqs, precision):
    if sum(freqs) == 0:
        freqs[0] = 1
    table = ans.quantize_freqs(freqs, precision)
    assert table.sum() == 2**precision
    assert ((table > 0) == (np.array(freqs) > 0)).all()
    assert ans.cost_bits(freqs, table) >= entropy(freqs) * sum(freqs) - 1e-6


def test_a_dominant_symbol_among_very_many_rare_ones():
    freqs = np.ones(65_000, int)
    freqs[7] = 10**7
    table = ans.quantize_freqs(freqs, 16)
    assert table.sum() == 1 << 16
    assert table.min() == 1
    assert table[7] == table.max()


@pytest.mark.parametrize("n", [0, 1, 4095, 4096, 4097, 20_000])
def test_ans_round_trips_and_is_near_the_entropy(n):
    symbols = geometric(n, seed=n)
    freqs = np.bincount(symbols, minlength=64)
    table = ans.quantize_freqs(freqs if n else np.ones(64), 14)
    data = ans.encode(symbols, table)
    np.testing.assert_array_equal(ans.decode(data, table, n), symbols)
    if n == 20_000:
        assert len(data) * 8 / n < entropy(freqs) * 1.004 + 32 * 5 / n


def test_ans_is_as_small_as_constrictions():
    constriction = pytest.importorskip("constriction")
    symbols = geometric(50_000).astype(np.int32)
    freqs = np.bincount(symbols)
    model = constriction.stream.model.Categorical(
        (freqs / freqs.sum()).astype(np.float32), perfect=False
    )
    coder = constriction.stream.stack.AnsCoder()
    coder.encode_reverse(symbols, model)
    theirs = 4 * len(coder.get_compressed())
    ours = len(ans.encode(symbols, ans.quantize_freqs(freqs, 14)))
    assert ours <= theirs * 1.005 + 4 * ans.lane_count(50_000)


@pytest.mark.parametrize("method", ["auto", "fixed", "huffman", "ans"])
@given(st.integers(0, 400), st.integers(1, 5000), st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_streams_round_trip(method, n, alphabet, seed):
    symbols = np.random.default_rng(seed).integers(0, alphabet, n)
    data = streams.encode(symbols, alphabet, method=method)
    reader = Reader(data + b"tail")
    out, used = streams.decode(reader, alphabet, limit=n)
    np.testing.assert_array_equal(out, symbols)
    assert reader.left == 4
    if method != "auto":
        assert len(streams.encode(symbols, alphabet)) <= len(data)
        assert n == 0 or used == method


def test_huge_alphabets_and_one_symbol():
    rng = np.random.default_rng(0)
    symbols = rng.integers(0, 1 << 16, 3000)
    for method in ("huffman", "ans"):
        data = streams.encode(symbols, 1 << 16, method=method)
        np.testing.assert_array_equal(streams.decode(Reader(data), 1 << 16, limit=3000)[0], symbols)
    data = streams.encode(np.full(100_000, 3), 8)
    assert len(data) < 200
    assert (streams.decode(Reader(data), 8, limit=100_000)[0] == 3).all()


def test_streams_refuse_nonsense():
    with pytest.raises(ValueError, match="method"):
        streams.encode([1], 2, method="zip")
    with pytest.raises(ValueError, match="outside"):
        streams.encode([2], 2)
    with pytest.raises(ValueError, match="alphabet"):
        streams.encode([0], 0)
    data = streams.encode(geometric(100), 64)
    with pytest.raises(FormatError, match="at most 99"):
        streams.decode(Reader(data), 64, limit=99)
    for cut in range(len(data)):
        with pytest.raises(FormatError):
            streams.decode(Reader(data[:cut]), 64, limit=100)
