"""Figures for Prometheus, read from what the engine counts."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

from persona_vectors.serving.engine import Engine


class Figures:
    """A collector: requests by status, tokens, steps, failures, rows in use and waiting, hooks on the model."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.statuses: Counter[int] = Counter()

    def count(self, status: int) -> None:
        """Take in one reply."""
        self.statuses[status] += 1

    def collect(self) -> Iterator[Any]:
        """Yield the figures as they stand."""
        requests = CounterMetricFamily("persona_vectors_requests", "Replies by status.", labels=["status"])
        for status, count in sorted(self.statuses.items()):
            requests.add_metric([str(status)], count)
        yield requests
        for name, what in (("tokens", "Tokens sampled."), ("steps", "Decoding steps."), ("errors", "Failed passes.")):
            yield CounterMetricFamily(f"persona_vectors_{name}", what, value=self.engine.figures[name])
        for name, value in zip(("rows", "waiting"), self.engine.load):
            yield GaugeMetricFamily(f"persona_vectors_{name}", f"Answers: {name}.", value=value)
        hooks = sum(len(module._forward_hooks) for module in self.engine.model.modules())
        yield GaugeMetricFamily("persona_vectors_hooks", "Hooks on the model: 0 without rows.", value=hooks)
