"""Every load that a plan serves finds a full CUDA graph, in vLLM's own manager."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import vllm.v1.worker.gpu.cudagraph_utils as cudagraph_utils
import vllm.v1.worker.gpu.model_runner as model_runner
from vllm.config import CUDAGraphMode
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from vllm_ppd.engine.v2.graphs import graphs_of, measured_graphs, served_graphs

# (from, to, rows besides the root)
SCHEDULE = [(1, 1, 63), (2, 2, 53), (3, 4, 28), (5, 8, 18), (9, 64, 8), (65, 256, 0)]


@pytest.fixture
def manager_of(monkeypatch):
    """A manager of the class that a runner would take now, its graphs captured."""
    place = SimpleNamespace(is_first_rank=True, is_last_rank=True)
    monkeypatch.setattr(cudagraph_utils, "get_pp_group", lambda: place)
    platform = SimpleNamespace(get_global_graph_pool=lambda: None)
    monkeypatch.setattr(cudagraph_utils, "current_platform", platform)

    def make(
        mode: CUDAGraphMode = CUDAGraphMode.FULL_AND_PIECEWISE,
        schedule: Any = SCHEDULE,
        most: int = 256,
    ) -> Any:
        drafts = max(more for *_, more in schedule)
        sizes = [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)]
        config = SimpleNamespace(
            scheduler_config=SimpleNamespace(
                max_num_seqs=most, max_num_batched_tokens=8192
            ),
            compilation_config=SimpleNamespace(
                cudagraph_capture_sizes=sizes, max_cudagraph_capture_size=512
            ),
            parallel_config=SimpleNamespace(tensor_parallel_size=1),
            speculative_config=SimpleNamespace(
                uses_dynamic_speculative_decoding=lambda: True,
                num_speculative_tokens_per_batch_size=schedule,
            ),
            num_speculative_tokens=drafts,
            cache_config=SimpleNamespace(use_kda_recoverssm=False),
        )
        made = model_runner.ModelCudaGraphManager(config, None, mode, drafts + 1)
        made._graphs_captured = True
        return made

    return make


def modes(manager: Any, schedule: Any = SCHEDULE) -> dict[tuple[int, int], str]:
    """How every load of the schedule runs; (requests, rows)."""
    return {
        (requests, more + 1): manager.dispatch(
            requests, requests * (more + 1), more + 1, 0, more + 1
        ).cg_mode.name
        for first, last, more in schedule
        for requests in range(first, last + 1)
    }


def test_no_load_falls_off_the_graphs(manager_of):
    stock = model_runner.ModelCudaGraphManager
    before = modes(manager_of())
    assert set(before.values()) == {"FULL", "PIECEWISE", "NONE"}
    with graphs_of(served_graphs(SCHEDULE, 63, 256)):
        manager = manager_of()
    assert model_runner.ModelCudaGraphManager is stock
    assert set(modes(manager).values()) == {"FULL"}
    # The largest come first, and there are fewer than vLLM would capture.
    descs = manager._capture_descs[CUDAGraphMode.FULL]
    sizes = [desc.num_tokens for desc in descs]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 576
    assert len(set(descs)) == len(descs) < 80
    # A graph has room for the step, and not much more than that.
    for requests, rows in before:
        found = manager.dispatch(requests, requests * rows, rows, 0, rows)
        assert found.uniform_token_count == rows
        assert requests <= found.num_reqs <= max(requests + 1, requests * 9 / 8)


def test_a_tier_that_lost_requests_is_padded(manager_of):
    with graphs_of(served_graphs(SCHEDULE, 63, 256)):
        manager = manager_of()
    # Three requests had 29 rows each when one of them ended.
    assert manager.dispatch(2, 58, 29, 0, 29).num_reqs == 3
    # Rows that nobody planned run in pieces, as prompts do.
    assert manager.dispatch(2, 14, 7, 0, 7).cg_mode == CUDAGraphMode.PIECEWISE
    assert manager.dispatch(2, 50, None, 0, None).cg_mode == CUDAGraphMode.PIECEWISE
    assert manager.dispatch(1, 5000, None, 0, None).cg_mode == CUDAGraphMode.NONE


def test_one_tier_without_a_schedule():
    assert served_graphs(None, 5, 4) == [(1, 6), (2, 6), (3, 6), (4, 6)]
    found = served_graphs([(1, 300, 0)], 1, 300)
    assert {(8, 1), (9, 1), (16, 1), (18, 1), (32, 1), (36, 1), (300, 1)} <= set(found)
    assert not {(17, 1), (33, 1), (299, 1)} & set(found)


def test_measuring_has_graphs_too(manager_of):
    sizes = served_graphs(SCHEDULE, 63, 256) + measured_graphs([1, 2, 64], 256)
    with graphs_of(sizes):
        manager = manager_of()
    for requests, rows in ((1, 1), (4, 2), (8, 64), (256, 2)):
        found = manager.dispatch(requests, requests * rows, rows, 0, rows)
        assert (found.num_reqs, found.uniform_token_count) == (requests, rows)
    # Larger ones are not worth their memory.
    assert manager.dispatch(32, 2048, 64, 0, 64).cg_mode == CUDAGraphMode.NONE


@pytest.mark.parametrize("mode", [CUDAGraphMode.PIECEWISE, CUDAGraphMode.NONE])
def test_users_may_want_no_full_graphs(manager_of, mode):
    with graphs_of(served_graphs(SCHEDULE, 63, 256)):
        manager = manager_of(mode)
    assert "FULL" not in modes(manager).values()


def test_full_graphs_alone(manager_of):
    with graphs_of(served_graphs(SCHEDULE, 63, 256)):
        manager = manager_of(CUDAGraphMode.FULL_DECODE_ONLY)
    assert set(modes(manager).values()) == {"FULL"}
    assert manager.dispatch(2, 50, None, 0, None).cg_mode == CUDAGraphMode.NONE


def test_an_error_while_graphs_are_listed_leaves_vllm_as_it_was():
    stock = model_runner.ModelCudaGraphManager
    with pytest.raises(RuntimeError), graphs_of([(1, 1)]):
        raise RuntimeError("no memory for a graph")
    assert model_runner.ModelCudaGraphManager is stock


def test_where_vllm_makes_its_manager():
    source = inspect.getsource(GPUModelRunner.initialize_kv_cache)
    assert "self.cudagraph_manager = ModelCudaGraphManager(" in source
    listing = inspect.getsource(cudagraph_utils.CudaGraphManager.__init__)
    assert "self._init_candidates()" in listing
