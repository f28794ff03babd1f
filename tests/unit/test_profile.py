"""Latency profiles: smoothing, curves, files and whose they are."""

import json

import numpy as np
import pytest

from vllm_ppd.adaptive.context_cost import ContextCost
from vllm_ppd.search.latency import (
    LatencyProfile,
    MeasurementError,
    cache_file,
    default_profile,
)

KEY = {"model": "a", "threads": 2}
PROFILE = LatencyProfile((1, 4), (1, 2, 8), ((1.0, 2.0, 4.0), (2.0, 4.0, 8.0)), KEY)


def test_noise_is_smoothed_so_that_nothing_larger_is_faster():
    raw = np.array([[1.0, 3.0, 2.0, 4.0], [0.8, 3.5, 3.5, 3.0]])
    found = LatencyProfile.smoothed((1, 2), (1, 2, 4, 8), raw, KEY)
    table = np.array(found.seconds)
    assert (np.diff(table, axis=0) >= 0).all()
    assert (np.diff(table, axis=1) >= 0).all()
    # Neighbours out of order share their mean.
    assert table[0].tolist() == [0.9, 2.5, 2.5, pytest.approx(11 / 3)]


def test_curves_lie_between_and_beyond_the_measured_loads():
    assert PROFILE.curve(1)(np.array([1, 8])).tolist() == [1, 4]
    assert PROFILE.curve(2)(np.array([1, 8])) == pytest.approx([4 / 3, 16 / 3])
    # Twice the requests, twice the rows in all.
    assert PROFILE.curve(8)(np.array([1, 2])).tolist() == [4, 8]


COST = ContextCost(128, 1e-3, 1e-3, 0)
BARE = LatencyProfile((1, 4), PROFILE.rows, PROFILE.seconds, KEY, COST, (1.5, 3.0))


def test_looking_for_guesses_takes_time():
    curve = BARE.curve(2)
    assert curve.plain_s == PROFILE.curve(2).plain_s == pytest.approx(4 / 3)
    assert curve(np.array([1, 8])) == pytest.approx([2.0, 16 / 3])
    assert PROFILE.curve(2).plain_s == PROFILE.curve(2)(1)
    assert BARE.curve(8).plain_s == 4 and BARE.curve(8)(1) == 6
    # Contexts are read by plain attention.
    longer = BARE.at_context(1128)
    assert longer.bare == pytest.approx((2.5, 7.0))
    assert longer.curve(1).plain_s == pytest.approx(2.0)
    # Measured out of order, steps take the mean.
    raw = np.array([[1.0, 2.0, 4.0]])
    found = LatencyProfile.smoothed((1,), (1, 2, 8), raw, KEY, np.array([3.0]))
    assert (found.seconds, found.bare) == (((1.0, 2.5, 4.0),), (2.5,))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_typical_machines(device):
    profile = default_profile(device)
    one, many = profile.curve(1), profile.curve(64)
    assert one(1) == 1.0
    # Rows are cheap while the device has slack, and not after.
    assert one(8) / one(1) < many(8) / many(1)


def test_files(tmp_path):
    path = tmp_path / "deep" / "profile.json"
    PROFILE.save(path)
    assert LatencyProfile.load(path) == PROFILE
    assert LatencyProfile.load(path, KEY) == PROFILE
    BARE.save(path)
    assert LatencyProfile.load(path, KEY) == BARE
    with pytest.raises(MeasurementError, match="with threads 2, and this is 4"):
        LatencyProfile.load(path, {**KEY, "threads": 4})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("rows"), "no latency profile"),
        (lambda d: d.update(format_version=1), "expected 'ppd_profile' 3"),
        (lambda d: d.update(format_version=2), "expected 'ppd_profile' 3"),
        (lambda d: d.update(bare=[1.0]), "bare has 1 times; expected 2 or none"),
        (lambda d: d.update(bare=[1.0, 1.9]), "at least as long as plain ones"),
        (lambda d: d.update(bare=[1.0, float("nan")]), "at least as long"),
        (lambda d: d.update(bare=3), "not iterable"),
        (lambda d: d.update(context_cost=3), "must be a mapping"),
        (lambda d: d.update(context_cost={"plain": 1e-6}), "missing"),
        (
            lambda d: d.update(
                context_cost={"context": 128, "plain": -1, "tree": 0, "row": 0}
            ),
            "plain is -1 s",
        ),
        (lambda d: d.update(rows=[2, 4, 8]), "rising from 1"),
        (lambda d: d.update(requests=[1]), "seconds has shape"),
        (lambda d: d["seconds"][0].__setitem__(1, -1.0), "finite and positive"),
        (lambda d: d["seconds"][0].__setitem__(1, "fast"), "fast"),
    ],
)
def test_bad_files(tmp_path, change, message):
    data = PROFILE.to_dict()
    change(data)
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(data))
    with pytest.raises(MeasurementError, match=message):
        LatencyProfile.load(path)


def test_unreadable_files(tmp_path):
    with pytest.raises(MeasurementError, match="cannot be read"):
        LatencyProfile.load(tmp_path / "nothing.json")
    (tmp_path / "profile.json").write_text("{")
    with pytest.raises(MeasurementError, match="is not JSON"):
        LatencyProfile.load(tmp_path / "profile.json")


def test_each_key_has_its_own_file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_file(KEY).is_relative_to(tmp_path / "vllm_ppd")
    assert cache_file(KEY) == cache_file(dict(reversed(KEY.items())))
    assert cache_file(KEY) != cache_file({**KEY, "threads": 3})
