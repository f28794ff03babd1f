"""The bigram table: counts, gains, files. Learning is in tests/kernels."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from vllm_ppd.files import FormatError
from vllm_ppd.trees.bigram import BigramCounts, BigramTable


def counted(pairs, vocabulary=6, size=3, smoothing=2.0):
    counts = BigramCounts(vocabulary)
    for part in np.array_split(np.array(pairs), 3):
        counts.add(part[:, 0], part[:, 1], np.ones(len(part)))
    return counts.table(size, 2, smoothing)


def test_a_small_table():
    pairs = [(0, 1)] * 6 + [(0, 2)] * 2 + [(1, 0)] * 3 + [(2, 0), (2, 1)]
    table = counted(pairs)
    assert table.ids[0, :2].tolist() == [1, 2]
    assert table.ids[1, 0] == 0
    # base(1) = (7 + 1) / (13 + 6); 0 was seen 8 times.
    base = 8 / 19
    expected = np.log((6 / base + 2) / (8 + 2))
    assert table.gains[0, 0] == pytest.approx(expected, abs=1e-6)
    assert table.floor[0] == pytest.approx(np.log(2 / 10), abs=1e-6)
    # Token 5 was not observed: the commonest tokens, all at gain 0.
    assert table.floor[5] == 0
    assert table.gains[5].tolist() == [0, 0, 0]
    assert table.weights == (1.0, 1.0)
    for row in table.ids:
        assert len(set(row.tolist())) == 3


def test_against_a_dense_count():
    rng = np.random.default_rng(0)
    pairs = np.minimum(rng.geometric(0.3, size=(500, 2)) - 1, 9)
    table = counted(pairs, vocabulary=10, size=4)
    dense = np.zeros((10, 10))
    np.add.at(dense, (pairs[:, 0], pairs[:, 1]), 1)
    base = (dense.sum(0) + 1) / (dense.sum() + 10)
    for u in range(10):
        size = min(4, np.count_nonzero(dense[u]))
        best = np.sort(dense[u])[::-1][:size]
        listed = table.ids[u][:size]
        assert dense[u, listed].tolist() == best.tolist()
        gains = np.log((dense[u, listed] / base[listed] + 2) / (dense[u].sum() + 2))
        np.testing.assert_allclose(table.gains[u][: len(listed)], gains, atol=1e-5)


def test_files(tmp_path):
    table = counted([(0, 1), (1, 2), (2, 3)])
    path = tmp_path / "bigram.safetensors"
    table.save(path)
    read = BigramTable.load(path, 6, 2)
    np.testing.assert_array_equal(read.ids, table.ids)
    np.testing.assert_allclose(read.gains, table.gains, atol=1e-2)
    np.testing.assert_array_equal(read.base, table.base)
    with pytest.raises(FormatError, match="is for 6 tokens and 2 prompt tokens"):
        BigramTable.load(path, 7, 2)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(FormatError, match=r"bigram\.safetensors cannot be used"):
        BigramTable.load(path, 6, 2)
    for notes, message in (
        ({"format": "other"}, "its format is 'other' version None; expected 'ppd_bigr"),
        ({"format": "ppd_bigram", "format_version": "2"}, "version 2; expected"),
        ({"format": "ppd_bigram", "format_version": "1"}, "ids"),
    ):
        save_file({"gains": table.gains}, path, notes)
        with pytest.raises(FormatError, match=message):
            BigramTable.load(path, 6, 2)
    with pytest.raises(FormatError, match="nothing"):
        BigramTable.load(tmp_path / "nothing", 6, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": np.full((4, 2), 9)}, "names token 9 outside its vocabulary of 4"),
        ({"gains": np.full((4, 2), np.nan)}, "NaN"),
        ({"gains": np.zeros((4, 3))}, "must both be"),
        ({"floor": np.zeros(5)}, "damaged"),
        ({"weights": ()}, "damaged"),
        ({"base": np.ones(3)}, "damaged"),
        ({"base": np.zeros(4)}, "base rates of a bigram table must be above 0"),
    ],
)
def test_bad_tables(change, message):
    good = {
        "ids": np.zeros((4, 2)),
        "gains": np.zeros((4, 2)),
        "floor": np.zeros(4),
        "weights": (1.0,),
        "base": np.full(4, 0.25),
    }
    with pytest.raises(FormatError, match=message):
        BigramTable(**{**good, **change})
