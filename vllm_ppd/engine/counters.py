"""PPD's own metrics, beside vLLM's: under /metrics and in ``LLM.get_metrics()``.

Workers publish their counts in a folder (see ``step_counts``); a collector in the
front-end process reads them when Prometheus asks. With several API servers vLLM
collects by another way, which does not know collectors: there is the log line only.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vllm_ppd.engine.step_counts import StepCounts, read_counts

__all__ = ["counts_of", "publish_metrics"]

# Processes that this one starts find the folder by it.
_FOLDER = "PPD_METRICS_FOLDER"
_published = False
_SAMPLED = " One step in eight counts."
_HELP = {
    "request_steps": "Steps of requests, with guesses and without." + _SAMPLED,
    "emitted_tokens": "Tokens that those steps emitted; over request_steps it is the "
    "acceptance length." + _SAMPLED,
    "rows": "Rows that those steps scheduled for decoding." + _SAMPLED,
    "candidates": "Guessed tokens among those rows." + _SAMPLED,
    "accepted_tokens": "Guessed tokens that were right, by their source." + _SAMPLED,
    "state_steps": "Steps with guesses, by how many prompt tokens the request's last "
    "step left outputs of." + _SAMPLED,
    "plan_changes": "How often the trees have changed to follow the traffic.",
}
_TIER = "tier_max_requests"
_TIER_HELP = (
    "The trees that serve now are for up to so many running requests; 0 is no limit."
)


class _PPDCollector(Collector):
    def __init__(self, folder: str):
        self._folder = folder

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Any] = {}
        for name, labels, value in read_counts(self._folder):
            if name not in families:
                keys = list(labels)
                families[name] = (
                    GaugeMetricFamily(f"vllm:ppd_{name}", _TIER_HELP, labels=keys)
                    if name == _TIER
                    else CounterMetricFamily(
                        f"vllm:ppd_{name}", _HELP[name], labels=keys
                    )
                )
            families[name].add_metric(list(labels.values()), value)
        yield from families.values()


def publish_metrics() -> None:
    """In the front end, before the workers start: make the folder and its reader.

    Once per process; engines that it starts later share both. A folder that the
    environment names already is that of a process which started this one.
    """
    global _published
    if _published:
        return
    _published = True
    folder = tempfile.mkdtemp(prefix="vllm_ppd_metrics_")
    os.environ[_FOLDER] = folder
    REGISTRY.register(_PPDCollector(folder))
    owner = os.getpid()

    def remove() -> None:
        # A forked child inherits this, and must leave the folder alone.
        if os.getpid() == owner:
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)


def counts_of(vllm_config: Any, num_states: int, publish: bool) -> StepCounts:
    """The counts of a worker; with ``publish`` the front end's metrics show them.

    Ranks of a tensor-parallel group count the same, so one of them publishes.
    """
    labels = {
        "model_name": str(vllm_config.model_config.served_model_name),
        "engine": str(vllm_config.parallel_config.data_parallel_index),
    }
    folder = os.environ.get(_FOLDER) if publish else None
    return StepCounts(num_states, folder, labels)
