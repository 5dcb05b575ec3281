"""The faults, as functions that do them to a stage while mail is under way; chaos/scenes.py says in which scene.

A `Play` returns when its fault is over. Processes die or are stopped, Redis is away, silent, full or loses a reply, the
relay is away or in trouble, clocks step. Every random choice comes from the stage's own
generator, so that a seed makes the same choices again.
"""

from __future__ import annotations

import csv
import datetime
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from rq.registry import StartedJobRegistry
from rq.serializers import JSONSerializer

from chaos.stage import REFUSED, TESTS, Stage
from queues.heartbeat import LOCKED_FOR
from tests.conversations import server_context
from tests.redis_troubles import Trouble
from tests.scripted_relay import (
    OBLIGING,
    Act,
    HungUp,
    Line,
    Step,
    command_address,
    last_words,
    reset,
    swallow,
    take,
    take_after,
)
from tests.servers import ROOT, eventually, free_port

HOUR = 3600
ACCEPT = (b"EVALSHA", b"tasks.deliver")  # what a request to Redis holds that stores a mail
Play = Callable[[Stage], None]


# --- processes killed -------------------------------------------------------------------------------------------------


def kill_workers_at_random(stage: Stage) -> None:
    with stage.relay_says(DOT=take_after(0.15)):
        for _ in range(5):
            stage.wait(0.3, 2.5)
            stage.signal(stage.rng.choice(stage.workers()))


def kill_front(stage: Stage) -> None:
    """Kills the process that accepts."""
    for _ in range(4):
        eventually(stage.is_up, 60)
        stage.wait(0.1, 1.2)
        stage.signal(stage.front)


def kill_front_unheard(stage: Stage) -> None:
    """Kills the process that accepts when a mail is stored and its answer has not left."""
    stage.proxy.lose(ACCEPT, 3, then=lambda: stage.signal(stage.front))
    eventually(lambda: stage.proxy.lost == 3, 90)


def kill_dashboard(stage: Stage) -> None:
    stage.house.environment |= {"DASHBOARD_LISTEN": f"127.0.0.1:{free_port()}", "PYTHONPATH": str(ROOT)}
    stage.keeper.keep("dashboard", ["-m", "ops.dashboard", "--no-login"])
    for starts in (1, 2):
        stage.has_logged("dashboard", "dashboard_started", starts)
        stage.signal("dashboard")


def kill_senders(stage: Stage) -> None:
    """Kills one of the processes that a worker has forked."""
    with stage.relay_says(DOT=take_after(0.15)):
        for _ in range(4):
            stage.relay_hears_a_mail()
            stage.wait(0, 1)
            os.kill(stage.rng.choice(stage.senders()), signal.SIGKILL)
    assert stage.relay.announced, "no mail was taken ahead"


def kill_parent(stage: Stage) -> None:
    with stage.relay_says(DOT=take_after(0.15)):
        for _ in range(3):
            stage.relay_hears_a_mail()
            stage.wait(0, 1)
            senders = stage.senders()
            stage.signal("worker-0")
            eventually(lambda senders=senders: not any(map(is_running, senders)), 5)  # type: ignore[misc]


def is_running(pid: int) -> bool:
    """Returns whether there is such a process, which is none that waits for its parent."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][:1] not in ("Z", "X")
    return False


def cut_power(stage: Stage) -> None:
    with stage.relay_says(DOT=take_after(0.15)):
        stage.relay_has(len(stage.mails) // 4)
        with stage.keeper.lock:  # so that nothing is started again meanwhile
            for name in stage.keeper.processes:
                stage.keeper.signal_group(name, signal.SIGKILL)
            stage.redis_server.kill()
            stage.wait(2)
            stage.redis_server.start()


def wait_for_death(stage: Stage) -> None:
    """Waits until the first worker has died at the point that the scene names. The relay puts mail off or refuses it if
    a worker gets to that point by this; a refusal lasts to the end."""
    steps = STEPS_TO.get(stage.scene.dies_at, dict)()
    if stage.scene.refuses:
        stage.relay.script |= {name: [step] for name, step in steps.items()}
    with stage.relay_says(**steps):
        stage.has_logged("worker-0", "killed at")
        stage.fault_over = time.monotonic()
        stage.wait(10)  # until the relay has put off all that it would


def kill_in_maintenance(stage: Stage) -> None:
    """Leaves the lock of a worker that died, and what it was about to find: a mail whose worker was killed."""
    stage.has_logged("worker-0", "killed at")
    stage.relay_has(1)
    with stage.relay_says(DOT=take_after(1)):
        stage.relay_hears_a_mail()
        stage.signal("worker-0")
        stage.client.set("rq:clean_registries:email", 1, ex=LOCKED_FOR)


def poison(stage: Stage) -> None:
    """Lets one mail kill its worker each time. Each death is noticed at once, not after a minute as in life."""
    mail = stage.mails[0]
    stage.doomed.add(mail.key)
    eventually(lambda: mail.key in stage.accepted, 60)
    mail_id = stage.accepted[mail.key]
    stage.keeper.keep("worker-0", [str(TESTS / "killed_worker.py"), "email", "after claim", mail_id])
    deaths = 0
    while stage.client.zscore("rq:failed:email", mail_id) is None:
        if len(stage.keeper.exits) > deaths:
            deaths += 1
            give_up_the_dead(stage, mail_id)
        assert not stage.over.wait(0.2)
        assert deaths <= 4, stage.keeper.exits


def give_up_the_dead(stage: Stage, mail_id: str = "") -> None:
    """Ends the dead workers' leases, for one mail or for all."""
    started: list[bytes] = stage.client.zrange("rq:wip:email", 0, -1)
    for entry in started:
        held_id = entry.decode().partition(":")[0]
        if mail_id in ("", held_id):
            stage.client.zadd("rq:wip:email", {entry: 1})
            stage.client.delete(f"mail:{held_id}:claim")


# --- Redis ------------------------------------------------------------------------------------------------------------


def restart_redis(end: signal.Signals, away: float = 0.5, times: int = 1) -> Play:
    def play(stage: Stage) -> None:
        with stage.relay_says(DOT=take_after(0.15)):
            stage.relay_has(2)
            for _ in range(times):
                stage.wait(0, 2)
                stage.redis_server.kill(end)
                stage.wait(away)
                stage.redis_server.start()

    return play


def trouble_redis(trouble: Trouble, seconds: float) -> Play:
    def play(stage: Stage) -> None:
        with stage.relay_says(DOT=take_after(0.15)):
            stage.relay_has(2)
            with trouble(stage.redis_server):
                stage.wait(seconds)

    return play


def lose_replies(*words: bytes, said: bytes = b"") -> Play:
    def play(stage: Stage) -> None:
        times = max(2, len(stage.mails) // 5)
        stage.proxy.lose(words, times, said=said)
        eventually(lambda: stage.proxy.lost == times, 90)

    return play


def flush_scripts(stage: Stage) -> None:
    for _ in range(60):
        stage.client.script_flush()
        stage.wait(0.1)


def clean_at_once(stage: Stage) -> None:
    """Kills two workers with mail in hand, and lets four look for it at the same moment, each without RQ's lock."""
    with stage.relay_says(DOT=take_after(0.5)):
        stage.relay_has(2)
        for name in stage.workers():
            stage.signal(name)
    together = threading.Barrier(4)

    def clean(_: int) -> None:
        registry = StartedJobRegistry("email", connection=stage.client, serializer=JSONSerializer)
        together.wait()
        registry.cleanup()

    give_up_the_dead(stage)
    with ThreadPoolExecutor(4) as cleaners:
        list(cleaners.map(clean, range(4)))


# --- the relay --------------------------------------------------------------------------------------------------------


def relay_says_for(seconds: float, **steps: Step) -> Play:
    def play(stage: Stage) -> None:
        with stage.relay_says(**dict(steps)):
            stage.wait(seconds)

    return play


def relay_does_to_some(step: Act, **rest: Step) -> Play:
    """Does `step` to every third mail of the first two thirds, at its place in the conversation."""
    [(name, good)] = rest.items()

    def play(stage: Stage) -> None:
        steps: list[Step] = [good, good, step] * max(2, len(stage.mails) // 5) + [good]
        with stage.relay_says(**{name: steps}):
            place = "." if name == "DOT" else name
            eventually(lambda: len(stage.relay.script[place]) == 1, 90)

    return play


def take_and_hang_up(line: Line) -> str:
    take(line)
    raise HungUp


def cut_around_the_dot(stage: Stage) -> None:
    """Cuts at random where a final dot comes, most of them with the commands of the next mail."""
    acts: list[Act] = [take_after(0.05)] * 6 + [take_and_hang_up, swallow, reset, last_words("421 4.3.2 bye")]

    def mail(line: Line) -> str:
        return reset(line) if stage.rng.random() < 0.03 else line.say(OBLIGING["MAIL"])

    with stage.relay_says(DOT=lambda line: stage.rng.choice(acts)(line), MAIL=mail):
        eventually(lambda: stage.submitted, 90)
    assert stage.relay.announced > len(stage.mails) // 8, stage.relay.announced


def greylist() -> dict[str, Step]:
    """Puts each recipient off once."""
    seen: set[str] = set()

    def rcpt(line: Line) -> str:
        address = command_address(line.command)
        reply = "250 2.1.5 ok" if address in seen else "451 4.7.1 greylisted, come again"
        seen.add(address)
        line.say(reply)
        return reply

    return {"RCPT": rcpt}


def deny_two_for_ever(stage: Stage) -> None:
    """Refuses the first two mails' recipients with what Postfix says of a domain that it does not relay to."""
    denied = {address for mail in stage.mails[:2] for address in mail.recipients}
    stage.doomed |= {mail.key for mail in stage.mails[:2]}

    def rcpt(line: Line) -> str:
        address = command_address(line.command)
        return line.say(f"454 4.7.1 <{address}>: Relay access denied" if address in denied else "250 2.1.5 ok")

    stage.relay.script["RCPT"] = [rcpt]
    eventually(lambda: stage.submitted, 120)


def answer_in_real_words(stage: Stage) -> None:
    """Answers half of all commands as relays really do, with a reply that puts off or says trouble."""
    with (TESTS / "relay_replies.tsv").open(encoding="utf-8") as table:
        rows = [row for row in csv.DictReader(table, delimiter="\t", quoting=csv.QUOTE_NONE) if int(row["pause"]) < 20]

    def sometimes(name: str, good: Step) -> Act:
        said = [row for row in rows if row["phase"] == name and row["verdict"] in ("try again", "trouble")]

        def act(line: Line) -> str:
            if stage.rng.random() < 0.5:
                return line.say("{code} {text}".format(**stage.rng.choice(said)))
            return good(line) if callable(good) else line.say(good)

        return act

    commands = {name: sometimes(name.lower(), OBLIGING[name]) for name in ("MAIL", "RCPT", "DATA")}
    with stage.relay_says(**commands, DOT=sometimes("dot", take)):
        stage.wait(stage.scene.spread + 10)


def use_up_the_quota(stage: Stage) -> None:
    """Takes a quarter of the mails, and then says for a while what Microsoft 365 says of the account's daily limit."""
    stage.relay_has(len(stage.mails) // 4)
    quota = "554 5.2.0 STOREDRV.Submission.Exception:SubmissionQuotaExceededException; Failed to process message"
    with stage.relay_says(DOT=quota):
        stage.wait(40)


def refuse_some() -> dict[str, Step]:
    def rcpt(line: Line) -> str:
        refused = command_address(line.command).startswith(REFUSED)
        reply = "550 5.1.1 no such user" if refused else "250 2.1.5 ok"
        line.say(reply)
        return reply

    return {"RCPT": rcpt}


def put_everybody_off(stage: Stage) -> None:
    with stage.relay_says(**greylist()):
        stage.wait(stage.scene.spread + 5)


def refuse_some_recipients(stage: Stage) -> None:
    with stage.relay_says(**refuse_some()):
        eventually(lambda: stage.submitted and all(map(stage.is_final, stage.accepted.values())), 60)


def take_relay_away(stage: Stage) -> None:
    with stage.relay_away():
        stage.wait(20)


def let_certificate_expire(stage: Stage) -> None:
    good = stage.relay.tls
    yesterday = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(days=1)
    stage.relay.tls = server_context(stage.authority, not_after=yesterday)
    stage.wait(6)
    stage.relay.tls = good


# Moves all moments that Redis holds for us back. KEYS: none. ARGV: seconds.
MAKE_TIME_PASS = """
local seconds = tonumber(ARGV[1])
for _, key in ipairs({'rq:scheduled:email', 'mail:open'}) do
  local entries = redis.call('ZRANGE', key, 0, -1, 'WITHSCORES')
  for at = 1, #entries, 2 do redis.call('ZADD', key, entries[at + 1] - seconds, entries[at]) end
end
local open_until = redis.call('HGET', 'relay:breaker', 'open_until')
if open_until then
  redis.call('HSET', 'relay:breaker', 'open_until', string.format('%.0f', open_until - 1000 * seconds))
end
local probe = redis.call('PTTL', 'relay:probe')
if probe > 0 then redis.call('PEXPIRE', 'relay:probe', math.max(1, probe - 1000 * seconds)) end
for _, key in ipairs({'relay:gone', 'relay:told'}) do
  for at, moment in ipairs(redis.call('LRANGE', key, 0, -1)) do
    redis.call('LSET', key, at - 1, string.format('%.0f', moment - 1000 * seconds))
  end
end
"""


def take_relay_away_for_an_hour(stage: Stage) -> None:
    """Lets time pass sixty times as fast: once a second, all moments in Redis are made 59 s older."""
    with stage.relay_away():
        for _ in range(60):
            stage.wait(1)
            stage.client.eval(MAKE_TIME_PASS, 0, "59")
        eventually(lambda: stage.submitted, 120)


# --- signals and clocks -----------------------------------------------------------------------------------------------


def drain(stage: Stage) -> None:
    with stage.relay_says(DOT=take_after(0.4)):
        for _ in range(3):
            stage.relay_hears_a_mail()
            stage.wait(0, 0.5)
            process = stage.keeper.processes["worker-0"]
            process.terminate()
            process.wait(30)
    assert {code for _, code in stage.keeper.exits} == {0}, stage.keeper.exits


def terminate_twice(stage: Stage) -> None:
    with stage.relay_says(DOT=take_after(3)):
        stage.relay_has(1)
        stage.signal("worker-0", signal.SIGTERM)
        stage.wait(1.3)  # RQ overlooks a second one within a second
        stage.signal("worker-0", signal.SIGTERM)
        eventually(lambda: stage.keeper.exits, 30)


def terminate_group(stage: Stage) -> None:
    with stage.relay_says(DOT=take_after(0.5)):
        stage.relay_has(2)
        stage.keeper.signal_group("worker-0", signal.SIGTERM)
        eventually(lambda: stage.keeper.exits, 30)
    assert {code for _, code in stage.keeper.exits} == {0}, stage.keeper.exits


def step_clock(*seconds: int, put_off: bool = False) -> Play:
    """Sets the clock to each of these offsets, for a third of the scene, with mail in hand."""

    def play(stage: Stage) -> None:
        with stage.relay_says(DOT=take_after(1), **(greylist() if put_off else {})):
            for offset in seconds:
                stage.wait(stage.scene.spread / 3)
                stage.set_clock(offset)
            stage.wait(stage.scene.spread)

    return play


def kill_and_step_clock_back(stage: Stage) -> None:
    """Kills a worker before the step: the lease that shows its death was written on the earlier clock."""
    with stage.relay_says(DOT=take_after(1)):
        stage.relay_hears_a_mail()
        stage.signal("worker-0")
        stage.set_clock(-HOUR)


def pause_machine(stage: Stage) -> None:
    """Stops a worker whose mail is accepted and the answer on its way; a second one goes on."""
    with stage.relay_says(DOT=take_after(1)):
        stage.relay_has(1)
        stage.has_stopped_a_worker = True
        stage.signal("worker-0", signal.SIGSTOP)
    stage.keeper.keep("worker-1", stage.program("worker.py", "email"))
    stage.wait(120)
    stage.signal("worker-0", signal.SIGCONT)
    stage.wait(5)  # until it has done what it wants to do with what it holds


STEPS_TO: Mapping[str, Callable[[], dict[str, Step]]] = {  # what the relay must do for a worker to get to a point
    "after the mail is delayed, before RQ's bookkeeping": greylist,
    "after RQ says scheduled, before it schedules": greylist,
    "in the scheduler's tick": greylist,
    "after the mail is given up, before RQ's bookkeeping": refuse_some,
}


def play(stage: Stage) -> None:
    """Lets the client submit and the fault happen. Returns when both are over."""
    client = threading.Thread(target=stage.submit_all, name="submitting")
    client.start()
    try:
        stage.scene.play(stage)
        stage.fault_over = stage.fault_over or time.monotonic()
        client.join(180)
    finally:
        if client.is_alive():
            stage.over.set()
            client.join()
