"""Where the V2 runner would wait for a device, without one."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def learning_from_every_step() -> Iterator[None]:
    """Learn bigrams from all steps, not from one in eight."""
    from vllm_ppd.engine.v2 import bigram_learner

    usual, bigram_learner.EVERY = bigram_learner.EVERY, 1
    try:
        yield
    finally:
        bigram_learner.EVERY = usual


def host_reads(llm: Any, prompts: Any, params: Any) -> list[str]:
    """Where PPD's part of the runner would wait for the device, as file:function:what.

    Everything is on the CPU here, but a read of a tensor's value is a read, and a
    number written to places that a tensor names is a copy from the host's memory.
    """
    import torch
    import vllm
    from torch.utils._python_dispatch import TorchDispatchMode

    # A value is read by "item" in inference mode, by "_local_scalar_dense" outside.
    reading = ("item", "_local_scalar_dense", "nonzero", "masked_select", "equal")
    reading += ("unique",)
    seen: set[str] = set()
    theirs = f"{Path(vllm.__file__).parent}/"

    def note(what: str) -> None:
        frames = inspect.stack(context=0)[2:]
        names = [frame.filename for frame in frames]
        if any("triton/runtime" in name for name in names):
            return  # the interpreter at work, which is the device here
        for frame in frames:
            if "vllm_ppd/engine/v2" in frame.filename:
                seen.add(f"{Path(frame.filename).name}:{frame.function}:{what}")
                return
            if frame.filename.startswith(theirs):
                return  # vLLM's own doing

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            indices = args[1] if name.startswith("index") and len(args) > 1 else []
            masks = [
                index
                for index in (indices if isinstance(indices, (list, tuple)) else [])
                if isinstance(index, torch.Tensor) and index.dtype == torch.bool
            ]
            if name in reading or masks:
                note(name)
            return func(*args, **(kwargs or {}))

    def watched(name: str) -> Any:
        stock = getattr(torch.Tensor, name)

        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            note(name)
            return stock(self, *args, **kwargs)

        return stock, method

    def set_places(self: Any, index: Any, value: Any) -> None:
        parts = index if isinstance(index, tuple) else (index,)
        named = any(isinstance(part, torch.Tensor) for part in parts)
        if named and not isinstance(value, torch.Tensor):
            note("__setitem__")
        methods["__setitem__"][0](self, index, value)

    methods = {name: watched(name) for name in ("tolist", "numpy", "cpu", "__array__")}
    methods["__setitem__"] = torch.Tensor.__setitem__, set_places
    for name, (_, method) in methods.items():
        setattr(torch.Tensor, name, method)
    try:
        with Watch(), learning_from_every_step():
            llm.generate(prompts, params, use_tqdm=False)
    finally:
        for name, (stock, _) in methods.items():
            setattr(torch.Tensor, name, stock)
    return sorted(seen)
