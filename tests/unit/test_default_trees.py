import pytest

from vllm_ppd.acceptance import AcceptanceError, AcceptanceStats
from vllm_ppd.config import PPDConfigError
from vllm_ppd.default_trees import acceptance_of, default_policy, typical_acceptance


@pytest.mark.parametrize("m", [1, 3, 6])
@pytest.mark.parametrize("num_ept", [1, 2])
@pytest.mark.parametrize("rows", [3, 8, 33])
def test_default_trees_fit_the_budget_and_speculate(m, num_ept, rows):
    policy = default_policy(typical_acceptance(m), num_ept, "cpu", rows)
    assert policy.max_rows <= rows
    assert policy.num_prompt_tokens == m
    assert policy.trees[0].prompts[0] >= 1


def test_devices_have_their_own_budgets():
    stats = typical_acceptance(3)
    assert default_policy(stats, 1, "cpu").max_rows == 4
    assert default_policy(stats, 1, "cuda").max_rows == 32


def test_too_small_a_budget_is_refused():
    with pytest.raises(PPDConfigError, match="num_speculative_tokens is 1, too small"):
        default_policy(typical_acceptance(3), 2, "cpu", 2)


def test_measured_acceptance_is_used_and_checked(tmp_path):
    assert acceptance_of(tmp_path, 3).num_prompt_tokens == 3
    AcceptanceStats([[0.5, 0.2], [0.3, 0.1]]).save(tmp_path / "acceptance.json")
    assert acceptance_of(tmp_path, 2).acceptance[0, 0] == 0.5
    with pytest.raises(AcceptanceError, match=r"is about 2 prompt tokens.*holds 3"):
        acceptance_of(tmp_path, 3)
