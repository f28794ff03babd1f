"""Acceptance models: what is read back, sources left out, and what is refused."""

from __future__ import annotations

import os

import numpy as np
import pytest

from tests.unit.models import random_model
from vllm_ppd.search.acceptance import AcceptanceModel
from vllm_ppd.search.latency import MeasurementError

TABLE = [[0.5, 0.2, 0.1], [0.3, 0.1, 0.15]]
MODEL = random_model(3, m=2, ranks=3, classes=2)


def assert_same(first: AcceptanceModel, second: AcceptanceModel) -> None:
    tables, others = ({**vars(model), "source": 0} for model in (first, second))
    np.testing.assert_equal(tables, others)


def test_round_trip(tmp_path):
    path = tmp_path / "acceptance.json"
    third = AcceptanceModel.of([[1 / 3, 1e-300, 0.1 + 0.2]], {"text": ["a"]})
    for model in (MODEL, MODEL.without_ngram(), MODEL.without_bigram(), third):
        model.save(path)
        assert_same(AcceptanceModel.load(path), model)
    assert AcceptanceModel.load(path).source == {"text": ["a"]}
    assert os.listdir(tmp_path) == ["acceptance.json"]


def test_values_are_copied_and_fixed():
    table = np.array(TABLE, dtype=np.float32)
    model = AcceptanceModel.of(table)
    table[0, 0] = 9
    assert model.prompted[0, 0] == model.marginal[0, 0] == 0.5
    with pytest.raises(ValueError, match="read-only"):
        model.prompted[0, 0] = 9
    AcceptanceModel.of([[0.5, 0.5 + 5e-7]])  # rounding of a sum is forgiven


def test_probabilities_by_place():
    # Off the n-gram draft: a prompt row's, then the table's, as deep as that reaches.
    where = MODEL.probabilities
    assert where(2, 1, 1, False).tolist() == MODEL.prompted[0].tolist()
    assert where(1, 0, 2, False).tolist() == MODEL.unprompted.tolist()
    assert where(9, 0, 2, False).tolist() == MODEL.prompted[1].tolist()
    assert where(0, 0, 4, False).any() and not where(0, 0, 5, False).any()
    # On it: its own token, then the others given that it is wrong.
    right = MODEL.ngram[1, 0]
    expected = [right, *(1 - right) * MODEL.beside[1, 0]]
    assert where(1, 2, 1, True) == pytest.approx(expected)
    expected = [right, *(1 - right) * MODEL.unprompted]
    assert where(0, 2, 1, True) == pytest.approx(expected)
    # Beyond the measured depth no n-gram token is right; class 0 has none.
    assert where(0, 1, 3, True)[0] == 0
    assert where(1, 0, 1, True).tolist() == MODEL.prompted[0].tolist()
    assert (MODEL.max_depth(0), AcceptanceModel.of(TABLE).max_depth(0)) == (4, 2)


def test_sources_that_are_switched_off():
    # Without n-gram matches, easier and harder steps are not told apart.
    without = MODEL.without_ngram()
    assert without.num_classes == 1
    np.testing.assert_array_equal(without.prompted, MODEL.overall[:2])
    np.testing.assert_array_equal(without.unprompted, MODEL.overall[2])
    # Without the bigram table its ranks mean nothing; n-gram drafts stay as measured.
    without = MODEL.without_bigram()
    np.testing.assert_array_equal(without.prompted, MODEL.marginal)
    np.testing.assert_array_equal(without.ngram, MODEL.ngram)
    assert not without.unprompted.any()
    neither = MODEL.without_bigram().without_ngram()
    assert (neither.num_classes, neither.unprompted.any()) == (1, False)
    # Matches that were not measured are as in ordinary text.
    assert neither.with_typical_ngrams().num_classes == 3
    assert MODEL.with_typical_ngrams() is MODEL


def test_of_a_folder(tmp_path):
    assert_same(AcceptanceModel.of_folder(tmp_path, 3), AcceptanceModel.typical(3))
    # Without prompt tokens the bigram table alone ranks, two levels deep.
    none = AcceptanceModel.of_folder(None, 0)
    assert (none.num_prompt_tokens, none.max_depth(0), none.max_depth(1)) == (0, 2, 6)
    assert none.probabilities(0, 0, 2, False)[0] == pytest.approx(0.2)
    MODEL.save(tmp_path / "acceptance.json")
    assert_same(AcceptanceModel.of_folder(tmp_path, 2), MODEL)
    with pytest.raises(MeasurementError, match=r"2 prompt tokens, but the folder ho"):
        AcceptanceModel.of_folder(tmp_path, 3)
