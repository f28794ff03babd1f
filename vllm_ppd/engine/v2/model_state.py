"""Trees in vLLM's model state: the one place between a step's rows and its forward."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_ppd.engine.attention import set_current_step
from vllm_ppd.engine.v2.request_trees import DraftMode, RequestTrees
from vllm_ppd.engine.v2.step_trees import StepBuffers, step_of

# Methods of vLLM's model state that the mixin overrides; their contract is tested.
OVERRIDDEN = ("add_request", "apply_staged_writes", "preprocess_state", "prepare_attn")


class TreeStateMixin:
    """Goes before the class of a model state that vLLM has built."""

    ppd_requests: RequestTrees
    ppd_buffers: StepBuffers
    ppd_new: list[tuple[int, DraftMode]]
    # Whether logits processors that are not vLLM's own see every request.
    ppd_custom: bool

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        super().add_request(req_index, new_req_data)  # type: ignore[misc]
        mode = DraftMode.of(new_req_data.sampling_params, self.ppd_custom)
        self.ppd_new.append((req_index, mode))

    def apply_staged_writes(self) -> None:
        super().apply_staged_writes()  # type: ignore[misc]
        if self.ppd_new:
            slots, modes = zip(*self.ppd_new, strict=True)
            self.ppd_requests.admit(list(slots), list(modes))
            self.ppd_new.clear()

    def preprocess_state(self, input_batch: InputBatch, *args: Any) -> None:
        super().preprocess_state(input_batch, *args)  # type: ignore[misc]
        self.ppd_buffers.place(input_batch)

    def prepare_attn(
        self, input_batch: InputBatch, *args: Any, for_capture: bool = False, **kw: Any
    ) -> dict[str, Any]:
        if for_capture:
            self.ppd_buffers.place_for_capture(input_batch)
        set_current_step(step_of(input_batch))
        try:
            return super().prepare_attn(  # type: ignore[misc]
                input_batch, *args, for_capture=for_capture, **kw
            )
        finally:
            set_current_step(None)


def with_trees(
    model_state: Any, requests: RequestTrees, buffers: StepBuffers, custom: bool
) -> Any:
    """A model state, of whichever class vLLM chose, that serves trees.

    custom: whether there are custom logits processors.

    It takes the place of ``model_state`` and shares all that it holds.
    """
    stock = type(model_state)
    served: Any = object.__new__(
        type(f"PPD{stock.__name__}", (TreeStateMixin, stock), {})
    )
    served.__dict__ = model_state.__dict__
    served.ppd_requests, served.ppd_buffers, served.ppd_new = requests, buffers, []
    served.ppd_custom = custom
    return served
