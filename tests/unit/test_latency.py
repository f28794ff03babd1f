"""Latency curves and profiles: smoothing, loads, files, expected speed."""

import numpy as np
import pytest

from vllm_ppd.search.latency import (
    LatencyCurve,
    LatencyProfile,
    cache_file,
    expected_speedup,
)
from vllm_ppd.trees.menu import MenuEntry
from vllm_ppd.trees.tree import TreePolicy, chain_tree

KEY = {"model": "a", "threads": 2}
PROFILE = LatencyProfile((1, 4), (1, 2, 8), ((1.0, 2.0, 4.0), (2.0, 4.0, 8.0)), KEY)


def test_curves():
    curve = LatencyCurve((1, 5, 10), (0.02, 0.03, 0.04), 0.004)
    assert curve(1) == 0.02
    assert curve(3) == pytest.approx(0.025)
    assert curve(20) == pytest.approx(0.08)
    assert curve(np.array([[5, 10]])).tolist() == [[0.03, 0.04]]
    assert LatencyCurve.constant()(1000) == 1.0
    assert LatencyCurve.linear(1.0, 0.5)(5) == 3.0


def test_noise_is_smoothed_so_that_nothing_larger_is_faster():
    raw = np.array([[1.0, 3.0, 2.0, 4.0], [0.8, 3.5, 3.5, 3.0]])
    profile = LatencyProfile.smoothed((1, 2), (1, 2, 4, 8), raw, KEY)
    table = np.array(profile.seconds)
    assert (np.diff(table, axis=0) >= 0).all()
    assert (np.diff(table, axis=1) >= 0).all()
    # Neighbours out of order share their mean.
    assert table[0].tolist() == [0.9, 2.5, 2.5, pytest.approx(11 / 3)]


def test_curves_lie_between_and_beyond_the_measured_loads():
    assert PROFILE.curve(1)(np.array([1, 8])).tolist() == [1, 4]
    assert PROFILE.curve(2)(np.array([1, 8])) == pytest.approx([4 / 3, 16 / 3])
    # Twice the requests, twice the rows in all.
    assert PROFILE.curve(8)(np.array([1, 2])).tolist() == [4, 8]
    # Twice the rows of the largest measured tree cost twice as much.
    assert PROFILE.curve(1)(16) == pytest.approx(8)


def test_profile_files(tmp_path):
    path = tmp_path / "deep" / "profile.json"
    PROFILE.save(path)
    assert LatencyProfile.load(path) == PROFILE
    assert LatencyProfile.load(path, KEY) == PROFILE
    assert LatencyProfile.from_dict(PROFILE.to_dict()) == PROFILE


def test_each_key_has_its_own_file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_file(KEY).is_relative_to(tmp_path / "vllm_ppd")
    assert cache_file(KEY) == cache_file(dict(reversed(KEY.items())))
    assert cache_file(KEY) != cache_file({**KEY, "threads": 3})


def test_the_expected_speedup_of_an_entry():
    policy = TreePolicy((chain_tree(0, (1,)), chain_tree(1, (1, 1))))
    curve = LatencyCurve((1, 2, 4), (1.0, 1.2, 1.5), 0.4)
    entry = MenuEntry((policy,), 1.6, ((2, 0.25), (4, 0.75)))
    expected = 1.6 / (0.25 * 1.2 + 0.75 * 1.5)
    assert expected_speedup(entry, curve) == pytest.approx(expected)
    # A step of the root alone costs no less than one of two rows: drafts are tried.
    entry = MenuEntry((policy,), 1.6, ((1, 0.25), (4, 0.75)))
    assert expected_speedup(entry, curve) == pytest.approx(expected)
    assert expected_speedup(MenuEntry((policy,)), curve) is None
