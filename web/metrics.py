"""What Prometheus is shown: `GET /metrics` of the API.

Everything comes from Redis, so each API process of each machine answers with the same figures: scrape one of them, or
take the maximum, never the sum. It only reads, by commands whose time does not grow with the queues; RQ's own counting
cleans up on the way, and may queue a job twice. While Redis does not answer, `async_email_redis_up` is 0 and all but
the version is left out. No label holds an address, a subject, an id or the name of a key.

monitoring/ has alert rules and a dashboard for these names.  Text format: https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from mail.counters import ACCEPT, RESULTS, SMTP, VERDICTS, Histogram
from mail.outbox import Outbox
from mail.store import LAST_SENT, SWEPT, TOTALS
from queues import health
from queues.connection import Unavailable, unavailable

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4


def exposition(outbox: Outbox, version: str) -> bytes:
    registry = CollectorRegistry()
    registry.register(Scrape(outbox, version))
    return generate_latest(registry)


class Scrape(Collector):
    def __init__(self, outbox: Outbox, version: str) -> None:
        self.outbox = outbox
        self.jobs = outbox.jobs
        self.version = version

    def collect(self) -> Iterator[Metric]:
        yield labelled("gauge", "build_info", "The version that answers.", ["version"], {(self.version,): 1})
        try:
            found = [*self.totals(), *self.queues(), *self.store()]
        except Unavailable:
            found = []
        yield gauge("redis_up", "Whether Redis answers the API.", bool(found))
        yield from found

    def totals(self) -> Iterator[Metric]:
        with unavailable():
            stored: Mapping[bytes, bytes] = self.jobs.redis.hgetall(TOTALS)  # type: ignore[assignment]
            swept: Sequence[Any] = self.jobs.redis.hmget(SWEPT, ["repaired", "given_up"])
            last_sent: Any = self.jobs.redis.get(LAST_SENT)
        counts = {name.decode(): int(value) for name, value in stored.items()}
        for name, total, text in (
            ("mails_accepted", "accepted", "Mails that were stored and queued."),
            ("delayed", "delayed", "Times that a mail was put off: by the relay, its trouble, doubt or SMTP_RATE."),
            ("in_doubt", "in_doubt", "Attempts after which the relay may have the mail and nobody knows."),
        ):
            yield CounterMetricFamily(f"async_email_{name}", text, counts.get(total, 0))
        ends = {(result,): counts.get(result, 0) for result in RESULTS}
        yield labelled("counter", "mails", "Mails by what became of them.", ["result"], ends)
        attempts = {(verdict,): counts.get(f"attempt:{verdict}", 0) for verdict in VERDICTS}
        yield labelled("counter", "attempts", "Attempts by what came of them.", ["verdict"], attempts)
        found = {(what,): int(number or 0) for what, number in zip(("repaired", "given_up"), swept, strict=True)}
        yield labelled("counter", "swept", "Mails that got stuck, by what the sweep did with them.", ["outcome"], found)
        yield gauge("last_sent_timestamp_seconds", "When a mail was last sent; 0: never.", float(last_sent or 0))
        yield histogram(SMTP, "smtp", "Conversations with the relay about one mail.", counts)
        yield histogram(ACCEPT, "accept", "Requests that were answered with 202, in the API.", counts)

    def queues(self) -> Iterator[Metric]:
        states = health.queue_states(self.jobs)
        jobs = {(name, what): number for name, seen in states.items() for what, number in seen.jobs.items()}
        yield labelled("gauge", "queue_jobs", "Jobs by where they wait.", ["queue", "state"], jobs)
        for name, attribute, text in (
            ("workers", "workers", "Workers that gave a sign of life in the last minute."),
            ("oldest_queued_seconds", "oldest_queued", "For how long the first job in the queue has waited."),
            ("overdue_seconds", "overdue", "How late the first job is that was put off and should be queued again."),
        ):
            values = {(queue,): getattr(seen, attribute) for queue, seen in states.items()}
            yield labelled("gauge", name, text, ["queue"], values)

    def store(self) -> Iterator[Metric]:
        with unavailable():
            memory: Any = self.jobs.redis.info("memory")
            disk: Any = self.jobs.redis.info("persistence")
        kept = bool(disk.get("aof_enabled")) and disk.get("aof_last_write_status", "ok") == "ok"
        yield gauge(
            "breaker_open", "Whether all mail waits because the relay is in trouble.", self.outbox.relay_in_trouble()
        )
        yield gauge("redis_memory_bytes", "What Redis takes.", memory["used_memory"])
        yield gauge("redis_memory_max_bytes", "What Redis may take (maxmemory); 0: any.", memory.get("maxmemory", 0))
        yield gauge("redis_append_only", "Whether Redis writes its append-only file, and well.", kept)


def gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"async_email_{name}", text, float(value))


def labelled(kind: str, name: str, text: str, labels: Sequence[str], values: Mapping[Any, float]) -> Metric:
    """`values` by the words for the labels, a tuple."""
    family = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily}[kind]
    metric: Any = family(f"async_email_{name}", text, labels=labels)
    for words, value in values.items():
        metric.add_metric(words, value)
    return metric  # type: ignore[no-any-return]


def histogram(one: Histogram, name: str, text: str, counts: Mapping[str, int]) -> Metric:
    bounds = [*(str(float(bound)) for bound in one.bounds), "+Inf"]
    running = accumulate(counts.get(field, 0) for field in one.fields)
    seconds = counts.get(one.sum_field, 0) / 1_000_000
    name = f"async_email_{name}_duration_seconds"
    return HistogramMetricFamily(name, text, buckets=list(zip(bounds, running, strict=True)), sum_value=seconds)
