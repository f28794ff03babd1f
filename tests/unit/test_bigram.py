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


def test_against_a_dense_count():
    rng = np.random.default_rng(0)
    pairs = np.minimum(rng.geometric(0.3, size=(500, 2)) - 1, 9)
    table = counted(pairs, vocabulary=12, size=4)
    dense = np.zeros((12, 12))
    np.add.at(dense, (pairs[:, 0], pairs[:, 1]), 1)
    base = (dense.sum(0) + 1) / (dense.sum() + 12)
    np.testing.assert_allclose(table.floor, np.log(2 / (dense.sum(1) + 2)), atol=1e-6)
    # Tokens that were not observed: the commonest tokens, all at gain 0.
    assert not table.gains[10:].any()
    assert set(table.ids[11]) == set(np.argsort(-base)[:4])
    assert table.weights == (1.0, 1.0)
    for u in range(12):
        assert len(set(table.ids[u])) == 4
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
    for notes, message in (
        ({"format": "ppd_bigram", "format_version": "2"}, "version 2; expected"),
        ({"format": "ppd_bigram", "format_version": "1"}, "ids"),
    ):
        save_file({"gains": table.gains}, path, notes)
        with pytest.raises(FormatError, match=message):
            BigramTable.load(path, 6, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": np.full((4, 2), 9)}, "names token 9 outside its vocabulary of 4"),
        ({"gains": np.full((4, 2), np.nan)}, "NaN"),
        ({"gains": np.zeros((4, 3))}, "must both be"),
        ({"floor": np.zeros(5)}, "damaged"),
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
