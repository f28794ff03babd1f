"""Trees in vLLM's model state: the one place between a step's rows and its forward."""

from __future__ import annotations

from typing import Any

import numpy as np
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_ppd.engine.v2.guessing import DraftMode
from vllm_ppd.engine.v2.request_trees import DeviceTrees

# Methods of vLLM's model state that the mixin overrides; their contract is tested.
OVERRIDDEN = ("add_request", "apply_staged_writes", "preprocess_state", "prepare_attn")


class TreeStateMixin:
    """Goes before the class of a model state that vLLM has built."""

    ppd: DeviceTrees
    ppd_new: list[tuple[int, Guessing]]

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        super().add_request(req_index, new_req_data)  # type: ignore[misc]
        params = new_req_data.sampling_params
        kind = DraftMode.NOTHING if params is None else DraftMode.of(params)
        self.ppd_new.append((req_index, kind))

    def apply_staged_writes(self) -> None:
        super().apply_staged_writes()  # type: ignore[misc]
        if self.ppd_new:
            slots, kinds = zip(*self.ppd_new, strict=True)
            self.ppd.admit(list(slots), list(kinds))
            self.ppd_new.clear()

    def preprocess_state(self, input_batch: InputBatch, *args: Any) -> None:
        super().preprocess_state(input_batch, *args)  # type: ignore[misc]
        self.ppd.place(input_batch)

    def prepare_attn(
        self, input_batch: InputBatch, *args: Any, for_capture: bool = False, **kw: Any
    ) -> dict[str, Any]:
        rows = 0
        if for_capture and len(np.unique(input_batch.num_scheduled_tokens)) == 1:
            rows = int(input_batch.num_scheduled_tokens[0])
        with self.ppd.published(rows):
            return super().prepare_attn(  # type: ignore[misc]
                input_batch, *args, for_capture=for_capture, **kw
            )


def with_trees(model_state: Any, trees: DeviceTrees) -> Any:
    """A model state, of whichever class vLLM chose, that serves ``trees``.

    It takes the place of ``model_state`` and shares all that it holds.
    """
    stock = type(model_state)
    served: Any = object.__new__(
        type(f"PPD{stock.__name__}", (TreeStateMixin, stock), {})
    )
    served.__dict__ = model_state.__dict__
    served.ppd, served.ppd_new = trees, []
    return served
