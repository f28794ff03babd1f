"""Every step that a menu makes finds a full CUDA graph, in vLLM's own manager."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import vllm.v1.worker.gpu.cudagraph_utils as cudagraph_utils
import vllm.v1.worker.gpu.model_runner as model_runner
from vllm.config import CUDAGraphMode

from vllm_ppd.engine.v2.graphs import graphs_of, served_graphs

# Rows per request of a menu's entries.
ROWS = [2, 4, 6, 8, 12, 16, 24, 32, 48, 64]


@pytest.fixture
def manager_of(monkeypatch):
    """A manager of the class that a runner would take now, its graphs captured."""
    of = SimpleNamespace
    place = of(is_first_rank=True, is_last_rank=True)
    monkeypatch.setattr(cudagraph_utils, "get_pp_group", lambda: place)
    platform = of(get_global_graph_pool=lambda: None)
    monkeypatch.setattr(cudagraph_utils, "current_platform", platform)

    def make(mode: CUDAGraphMode = CUDAGraphMode.FULL_AND_PIECEWISE) -> Any:
        sizes = [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)]
        config = of(
            scheduler_config=of(max_num_seqs=256, max_num_batched_tokens=8192),
            compilation_config=of(
                cudagraph_capture_sizes=sizes, max_cudagraph_capture_size=512
            ),
            parallel_config=of(tensor_parallel_size=1),
            speculative_config=of(uses_dynamic_speculative_decoding=lambda: False),
            num_speculative_tokens=63,
            cache_config=of(use_kda_recoverssm=False),
        )
        made = model_runner.ModelCudaGraphManager(config, None, mode, 64)
        made._graphs_captured = True
        return made

    return make


def modes(manager: Any) -> dict[tuple[int, int], str]:
    """How every load of every row count runs; (requests, rows)."""
    return {
        (requests, rows): manager.dispatch(
            requests, requests * rows, rows, 0, rows
        ).cg_mode.name
        for rows in (1, *ROWS)
        for requests in range(1, 257)
        if requests * rows <= 1024
    }


def test_no_load_falls_off_the_graphs(manager_of):
    stock = model_runner.ModelCudaGraphManager
    assert set(modes(manager_of()).values()) == {"FULL", "PIECEWISE", "NONE"}
    with graphs_of(served_graphs(ROWS, 256)):
        manager = manager_of()
    assert model_runner.ModelCudaGraphManager is stock
    assert set(modes(manager).values()) == {"FULL"}
    # The largest come first, and there are few for so many pairs.
    descs = manager._capture_descs[CUDAGraphMode.FULL]
    sizes = [desc.num_tokens for desc in descs]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 1024
    assert len(set(descs)) == len(descs) < 180
    # A graph has room for the step, and not much more than that.
    for requests, rows in modes(manager):
        desc = manager.dispatch(requests, requests * rows, rows, 0, rows)
        assert desc.uniform_token_count == rows
        padded = requests * (9 / 8 if rows == 1 else 3 / 2)
        assert requests <= desc.num_reqs <= max(requests + 1, padded)
    # Larger ones are not worth their memory.
    assert manager.dispatch(32, 2048, 64, 0, 64).cg_mode == CUDAGraphMode.NONE


def test_steps_of_other_shapes_run_in_pieces(manager_of):
    with graphs_of(served_graphs(ROWS, 256)):
        manager = manager_of()
    # Rows that no entry has, and steps that read prompts.
    assert manager.dispatch(2, 14, 7, 0, 7).cg_mode == CUDAGraphMode.PIECEWISE
    assert manager.dispatch(2, 50, None, 0, None).cg_mode == CUDAGraphMode.PIECEWISE
    assert manager.dispatch(1, 5000, None, 0, None).cg_mode == CUDAGraphMode.NONE


def test_sizes_of_one_entry():
    plain = [(load, 1) for load in range(1, 5)]
    assert served_graphs([6], 4) == [*plain, *((load, 6) for load in range(1, 5))]
    sizes = served_graphs([64], 300)
    assert {(8, 1), (9, 1), (16, 1), (18, 1), (32, 1), (36, 1), (300, 1)} <= set(sizes)
    assert not {(17, 1), (33, 1), (299, 1)} & set(sizes)
    assert [load for load, rows in sizes if rows == 64] == [1, 2, 3, 4, 6, 8, 12, 16]
    loads = [load for load, rows in served_graphs([24], 300) if rows == 24]
    assert loads[-2:] == [32, 42]


@pytest.mark.parametrize(
    ("mode", "full"),
    [
        (CUDAGraphMode.PIECEWISE, False),
        (CUDAGraphMode.NONE, False),
        (CUDAGraphMode.FULL_DECODE_ONLY, True),
    ],
)
def test_users_choose_the_kind_of_graphs(manager_of, mode, full):
    with graphs_of(served_graphs(ROWS, 256)):
        manager = manager_of(mode)
    assert ("FULL" in modes(manager).values()) is full
    assert manager.dispatch(2, 50, None, 0, None).cg_mode != CUDAGraphMode.FULL


def test_an_error_while_graphs_are_listed_leaves_vllm_as_it_was():
    stock = model_runner.ModelCudaGraphManager
    with pytest.raises(RuntimeError), graphs_of([(1, 1)]):
        raise RuntimeError("no memory for a graph")
    assert model_runner.ModelCudaGraphManager is stock
