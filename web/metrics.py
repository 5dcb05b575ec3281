"""`GET /metrics`: the figures for Prometheus.

Everything comes from Redis, so each API process of each machine answers with the same figures: scrape one of them, or
take the maximum, never the sum. Only reads, by commands whose time does not grow with the queues; RQ's own counting
cleans up on the way, and may queue a job twice. While Redis does not answer, `async_email_redis_up` is 0 and all but
the version is left out. No label holds an address, a subject, an id or the name of a key.

monitoring/ has alert rules and a dashboard for these names.  Text format: https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from mail import counters, sweep
from mail.claim import SUPPRESSED_RECIPIENTS
from mail.counters import ACCEPT, DELIVERED, RESULTS, SMTP, VERDICTS, Histogram
from mail.outbox import Outbox
from mail.reader import At
from queues import health
from queues.connection import Unavailable, translating_errors, weaknesses
from webhooks.queue import standings

Labelled = type[CounterMetricFamily] | type[GaugeMetricFamily]
CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
COUNTERS = (  # name, its field in mail:totals, what it counts
    ("mails_accepted", "accepted", "Mails that were stored and queued."),
    ("delayed", "delayed", "Times that a mail was put off: by the relay, its trouble, doubt or SMTP_RATE."),
    ("suppressed_recipients", SUPPRESSED_RECIPIENTS, "Recipients who were left out, being on the suppression list."),
    ("in_doubt", "in_doubt", "Attempts after which the relay may have the mail and nobody knows."),
)
QUEUE_GAUGES = (  # name, its attribute of a QueueState, what it shows
    ("workers", "workers", "Workers with a heartbeat in the last minute."),
    ("oldest_queued_seconds", "oldest_queued", "For how long the first job in the queue has waited."),
    ("overdue_seconds", "overdue", "How late the first job is that was put off and should be queued again."),
)


def exposition(outbox: Outbox, version: str) -> bytes:
    return generate_latest(Scrape(outbox, version))


@dataclass
class Scrape(Collector):
    outbox: Outbox
    version: str

    def collect(self) -> Iterator[Metric]:
        yield labelled(GaugeMetricFamily, "build_info", "The version that answers.", ["version"], {(self.version,): 1})
        try:
            found = [*self.totals(), *self.queues(), *self.store(), *self.webhooks()]
        except Unavailable:
            found = []
        yield gauge("redis_up", "Whether Redis answers the API.", bool(found))
        yield from found

    def totals(self) -> Iterator[Metric]:
        counts, swept = counters.totals(self.outbox.jobs.redis), sweep.swept(self.outbox.jobs.redis)
        for name, field, text in COUNTERS:
            yield CounterMetricFamily(f"async_email_{name}", text, counts[field])
        ends = {(result,): counts[result] for result in RESULTS}
        yield labelled(CounterMetricFamily, "mails", "Mails by their final state.", ["result"], ends)
        attempts = {(verdict,): counts[f"attempt:{verdict}"] for verdict in VERDICTS}
        yield labelled(CounterMetricFamily, "attempts", "Attempts by their verdict.", ["verdict"], attempts)
        stuck = {("repaired",): swept["mails_repaired"], ("given_up",): swept["mails_given_up"]}
        text = "Mails that got stuck, by what the sweep did with them."
        yield labelled(CounterMetricFamily, "swept", text, ["outcome"], stuck)
        text = "When a mail was last sent; 0: never."
        yield gauge("last_sent_timestamp_seconds", text, self.outbox.last_sent() or 0)
        yield histogram(SMTP, "smtp", "Sessions with the relay, the time for one mail.", counts)
        yield histogram(DELIVERED, "delivered", "Mails that were sent, the time since they were to be.", counts)
        yield histogram(ACCEPT, "accept", "Requests that were accepted, in the API.", counts)

    def queues(self) -> Iterator[Metric]:
        states = health.queue_states(self.outbox.jobs)
        jobs = {(name, what): number for name, seen in states.items() for what, number in seen.jobs.items()}
        yield labelled(GaugeMetricFamily, "queue_jobs", "Jobs by where they wait.", ["queue", "state"], jobs)
        for name, attribute, text in QUEUE_GAUGES:
            values = {(queue,): getattr(seen, attribute) or 0 for queue, seen in states.items()}
            yield labelled(GaugeMetricFamily, name, text, ["queue"], values)

    def store(self) -> Iterator[Metric]:
        with translating_errors():
            info: dict[str, Any] = self.outbox.jobs.redis.info()
        kept = not {name for name, _ in weaknesses(info)} & {"no_aof", "aof_failing"}
        relays = self.outbox.standings()
        text = "Whether all mail waits because the relay is in trouble."
        yield gauge("breaker_open", text, all(one.in_trouble for one in relays))
        yield from self.relays(relays)
        yield from self.replicas(info)
        listed = self.outbox.suppressions.size()
        yield gauge("suppressions", "Addresses on the suppression list.", listed)
        yield gauge("redis_memory_bytes", "What Redis takes.", info["used_memory"])
        yield gauge("redis_memory_max_bytes", "What Redis may take (maxmemory); 0: any.", info.get("maxmemory", 0))
        yield gauge("redis_append_only", "Whether Redis writes its append-only file, and well.", kept)

    def replicas(self, info: dict[str, Any]) -> Iterator[Metric]:
        """Yields how what is written outlives the primary; nothing where Redis stands alone."""
        if not (seen := health.replicas(self.outbox.jobs, info)):
            return
        yield gauge("redis_replicas_in_step", "Replicas that have what the primary has.", seen.in_step)
        yield gauge("redis_replicas_known", "Replicas that there should be.", seen.known)
        yield gauge("redis_confirms", "Whether replicas confirm what is written (REDIS_REPLICAS).", not seen.why)
        yield gauge("redis_sentinels_answering", "Sentinels that answer the API.", seen.sentinels)
        yield gauge("redis_sentinels", "Sentinels that REDIS_URL names.", seen.of_sentinels)

    def relays(self, relays: list[At]) -> Iterator[Metric]:
        """Yields the figures of each of several relays."""
        named = [one for one in relays if not one.relay.is_only]
        counts, gauges = counters.totals(self.outbox.jobs.redis) if named else {}, GaugeMetricFamily
        opened = {(one.relay.name,): float(one.in_trouble) for one in named}
        text = "Whether the relay is in trouble, so that mail goes by another."
        yield labelled(gauges, "relay_breaker_open", text, ["relay"], opened)
        used = {(one.relay.name, str(rate)): float(mails) for one in named for rate, mails in one.used}
        yield labelled(gauges, "relay_rate_used", "Mails within the period of a rate.", ["relay", "rate"], used)
        attempts = {
            (one.relay.name, verdict): counts[f"relay:{one.relay.name}:{verdict}"]
            for one in named
            for verdict in VERDICTS[:-1]
        }
        text = "Attempts at each relay by their verdict."
        yield labelled(CounterMetricFamily, "relay_attempts", text, ["relay", "verdict"], attempts)

    def webhooks(self) -> Iterator[Metric]:
        with translating_errors():
            found = standings(self.outbox.jobs.redis)
        outcomes = ("delivered", "failed", "given_up", "dropped")
        posts = {(one.name, what): one.counts.get(what, 0) for one in found for what in outcomes}
        text = "Events by what became of them; failed: tries that failed."
        yield labelled(CounterMetricFamily, "webhook_events", text, ["endpoint", "outcome"], posts)
        waiting = {(one.name,): one.waiting for one in found}
        yield labelled(GaugeMetricFamily, "webhook_waiting", "Mails whose events wait.", ["endpoint"], waiting)
        text = "Since when the endpoint has failed; 0: it answers."
        since = {(one.name,): one.since for one in found}
        yield labelled(GaugeMetricFamily, "webhook_down_since_timestamp_seconds", text, ["endpoint"], since)


def gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"async_email_{name}", text, float(value))


def labelled(family: Labelled, name: str, text: str, labels: list[str], values: Mapping[Any, float]) -> Metric:
    """Makes a metric with a sample for each entry of `values`, which are keyed by tuples of the labels' values."""
    metric = family(f"async_email_{name}", text, labels=labels)
    for words, value in values.items():
        metric.add_metric(words, value)
    return metric


def histogram(one: Histogram, name: str, text: str, counts: Mapping[str, int]) -> Metric:
    bounds = [*(str(float(bound)) for bound in one.bounds), "+Inf"]
    running = accumulate(counts[field] for field in one.fields)
    name = f"async_email_{name}_duration_seconds"
    seconds = counts[one.sum_field] / 1_000_000
    return HistogramMetricFamily(name, text, buckets=list(zip(bounds, running, strict=True)), sum_value=seconds)
