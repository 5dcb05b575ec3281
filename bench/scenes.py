"""The faults: SCENES by name, each a sentence and a function that does it to a stage while mail is under way.

A function returns when its fault is over; `bench.chaos` then waits for the mail and `bench.ledger` counts. What differs
by data only (points at which a worker dies, what a relay says, which reply of Redis is lost) stands in tables. Every
random choice comes from the stage's own generator, so that a seed plays the same scene again.
"""

from __future__ import annotations

import datetime
import signal
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

from rq.registry import StartedJobRegistry
from rq.serializers import JSONSerializer

from bench.stage import QUICK, REFUSED, TESTS, Scene, Stage
from tests.killed_worker import POINTS
from tests.scripted_relay import Act, Line, Step, command_address, drip, hang, hang_up, last_words, swallow, take_after
from tests.servers import eventually

PROMISE = 120  # seconds in which what a killed worker held is sent, with default settings and no operator
HOUR = 3600
Play = Callable[[Stage], None]


# --- processes killed -------------------------------------------------------------------------------------------------


def kill_workers_at_random(stage: Stage) -> None:
    with stage.relay_says(DOT=take_after(0.15)):
        for _ in range(5):
            stage.wait(0.3, 2.5)
            stage.signal(stage.rng.choice(stage.workers()))


def kill_api(stage: Stage) -> None:
    for _ in range(4):
        eventually(stage.is_up, 60)
        stage.wait(0.1, 1.2)
        stage.signal("api")


def kill_dashboard(stage: Stage) -> None:
    stage.house.environment |= {"DASHBOARD_LISTEN": "127.0.0.1:0", "PYTHONPATH": str(TESTS.parent)}
    stage.keeper.keep("dashboard", ["-m", "ops.dashboard", "--no-login"])
    for _ in range(2):
        stage.wait(2, 3)
        stage.signal("dashboard")


def cut_power(stage: Stage) -> None:
    with stage.relay_says(DOT=take_after(0.15)):
        stage.relay_has(len(stage.mails) // 4)
        with stage.keeper.lock:  # so that nothing is started again meanwhile
            for process in stage.keeper.processes.values():
                process.kill()
            stage.redis_server.kill()
            stage.wait(2)
            stage.redis_server.start()


def wait_for_death(stage: Stage) -> None:
    """The first worker dies at the point that the scene names. Where it must be put off for that, the relay does so."""
    with stage.relay_says(**STEPS_TO.get(stage.scene.dies_at, dict)()):
        eventually(lambda: "killed at" in stage.house.log("worker-0"), 90)
        stage.fault_over = time.monotonic()
        stage.wait(10)  # until the relay has put off whatever it would


def kill_in_maintenance(stage: Stage) -> None:
    """Its lock stays behind, and beside it what it was about to find: a mail whose worker was killed."""
    eventually(lambda: "killed at" in stage.house.log("worker-0"), 60)
    stage.relay_has(1)
    with stage.relay_says(DOT=take_after(1)):
        held = len(stage.relay.bodies)
        eventually(lambda: len(stage.relay.bodies) > held, 30)
        stage.signal("worker-0")
        stage.client.set("rq:clean_registries:email", 1, ex=60)


def poison(stage: Stage) -> None:
    """Only the time after which a dead worker is given up is put forward here: four times a minute otherwise."""
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
    """As if the dead worker's time had run out, for one mail or for all."""
    started: list[bytes] = stage.client.zrange("rq:wip:email", 0, -1)
    for entry in started:
        held_id = entry.decode().partition(":")[0]
        if mail_id in ("", held_id):
            stage.client.zadd("rq:wip:email", {entry: 1})
            stage.client.delete(f"mail:{held_id}:claim")


# --- Redis ------------------------------------------------------------------------------------------------------------


def restart_redis(end: signal.Signals, away: float = 0.5) -> Play:
    def play(stage: Stage) -> None:
        stage.relay_has(2)
        stage.redis_server.process.send_signal(end)
        stage.redis_server.process.wait()
        stage.wait(away)
        stage.redis_server.start()

    return play


def blackhole_redis(stage: Stage) -> None:
    stage.relay_has(2)
    stage.redis_server.process.send_signal(signal.SIGSTOP)
    stage.wait(20)
    stage.redis_server.process.send_signal(signal.SIGCONT)


def fill_redis(stage: Stage) -> None:
    stage.relay_has(2)
    stage.client.config_set("maxmemory", 1)
    stage.wait(8)
    stage.client.config_set("maxmemory", 0)


def make_redis_read_only(stage: Stage) -> None:
    stage.relay_has(2)
    # A replica that cannot reach its master keeps what it has.
    stage.client.replicaof("127.0.0.1", "1")
    stage.wait(8)
    stage.client.replicaof("NO", "ONE")


def lose_replies(*words: bytes) -> Play:
    def play(stage: Stage) -> None:
        times = max(2, len(stage.mails) // 5)
        stage.proxy.lose(words, times)
        eventually(lambda: stage.proxy.lost == times, 90)

    return play


def flush_scripts(stage: Stage) -> None:
    for _ in range(60):
        stage.client.script_flush()
        stage.wait(0.1)


def clean_at_once(stage: Stage) -> None:
    """Two are killed with mail in hand, and four look for it at the same moment, each without RQ's lock."""
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
    """To every third mail of the first two thirds, at `step`'s place in the conversation."""
    [(name, good)] = rest.items()

    def play(stage: Stage) -> None:
        steps: list[Step] = [good, good, step] * max(2, len(stage.mails) // 5) + [good]
        with stage.relay_says(**{name: steps}):
            place = "." if name == "DOT" else name
            eventually(lambda: len(stage.relay.script[place]) == 1, 90)

    return play


def greylist() -> dict[str, Step]:
    """Puts everybody off at his first visit."""
    seen: set[str] = set()

    def rcpt(line: Line) -> str:
        address = command_address(line.command)
        reply = "250 2.1.5 ok" if address in seen else "451 4.7.1 greylisted, come again"
        seen.add(address)
        line.say(reply)
        return reply

    return {"RCPT": rcpt}


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
        eventually(lambda: stage.submitted_at, 60)
        stage.wait_until_final()


def take_relay_away(stage: Stage) -> None:
    with stage.relay_away():
        stage.wait(20)


def let_certificate_expire(stage: Stage) -> None:
    good = stage.relay.tls
    stage.relay.tls = stage.certificate(datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(days=1))
    stage.wait(6)
    stage.relay.tls = good


# As if a minute passed: all moments that Redis holds for us move back. KEYS: none. ARGV: seconds.
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
    """Time passes sixty times as fast: once a second, what Redis holds is made 59 s older."""
    with stage.relay_away():
        for _ in range(60):
            stage.wait(1)
            stage.client.eval(MAKE_TIME_PASS, 0, "59")
        eventually(lambda: stage.submitted_at, 120)


# --- signals and clocks -----------------------------------------------------------------------------------------------


def drain(stage: Stage) -> None:
    with stage.relay_says(DOT=take_after(0.3)):
        for _ in range(3):
            stage.wait(0.5, 2)
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
    """To each of these offsets, for a third of the scene."""

    def play(stage: Stage) -> None:
        with stage.relay_says(**(greylist() if put_off else {})):
            for offset in seconds:
                stage.wait(stage.scene.spread / 3)
                stage.set_clock(offset)
            stage.wait(stage.scene.spread)

    return play


def pause_machine(stage: Stage) -> None:
    """The worker stands still with its mail accepted and the answer on its way; a second one goes on."""
    with stage.relay_says(DOT=take_after(1)):
        stage.relay_has(1)
        stage.has_stopped_a_worker = True
        stage.signal("worker-0", signal.SIGSTOP)
    stage.keeper.keep("worker-1", stage.program("worker.py", "email"))
    stage.wait(120)
    stage.signal("worker-0", signal.SIGCONT)
    stage.wait(5)  # until it has done what it wants to do with what it holds


# --- the tables -------------------------------------------------------------------------------------------------------

STEPS_TO: Mapping[str, Callable[[], dict[str, Step]]] = {  # what the relay must do for a worker to get to a point
    "after the mail is delayed, before RQ's bookkeeping": greylist,
    "after RQ says scheduled, before it schedules": greylist,
    "in the scheduler's tick": greylist,
    "in the scheduler's tick, all of the worker": greylist,
    "after the mail is given up, before RQ's bookkeeping": refuse_some,
}


def killed_at(point: str) -> Scene:
    put_off = STEPS_TO.get(point) is greylist
    refuses = STEPS_TO.get(point) is refuse_some
    return Scene(
        f"killed {point}",
        f"the e-mail worker is killed with SIGKILL {point}, for a random mail",
        kill_in_maintenance if point == "in maintenance" else wait_for_death,
        settings={"RETRY_SCHEDULE": QUICK} if put_off else {},
        dies_at=point,
        refuses=refuses,
        limit=PROMISE,
    )


MORE = [
    Scene("workers killed", "two e-mail workers are killed at random moments", kill_workers_at_random, workers=2),
    Scene("API killed", "the API is killed four times while it accepts", kill_api, held=False),
    Scene("dashboard killed", "the dashboard is killed twice", kill_dashboard, held=False),
    Scene("power cut", "API, workers and Redis are killed at the same moment", cut_power, workers=2),
    Scene("poison mail", "a mail kills its worker each time", poison, workers=0),
    Scene("Redis killed", "Redis is killed and started again", restart_redis(signal.SIGKILL)),
    Scene("Redis restarted", "Redis is told to stop and started again", restart_redis(signal.SIGTERM), held=False),
    Scene("Redis away", "Redis is away for 45 seconds", restart_redis(signal.SIGKILL, 45)),
    Scene("Redis silent", "Redis answers nothing for 20 seconds", blackhole_redis),
    Scene("Redis full", "Redis is out of memory for 8 seconds", fill_redis),
    Scene("Redis read-only", "Redis is a replica for 8 seconds", make_redis_read_only),
    Scene("scripts flushed", "Redis forgets all scripts, ten times a second", flush_scripts, held=False),
    Scene("maintenance at once", "four look for what two killed workers held", clean_at_once, workers=2),
    Scene(
        "relay away",
        "the relay refuses connections for longer than RETRY_SCHEDULE lasts",
        take_relay_away,
        settings={"RETRY_SCHEDULE": "1s,1s"},
        uncounted=True,
        held=False,
    ),
    Scene(
        "relay away for an hour",
        "the relay refuses 25 times as many mails for a simulated hour",
        take_relay_away_for_an_hour,
        uncounted=True,
        held=False,
        spread=20,
        times=25,
        workers=2,
        limit=60,
    ),
    Scene(
        "greylisted", "the relay puts each recipient off once", put_everybody_off, settings={"RETRY_SCHEDULE": QUICK}
    ),
    Scene(
        "some refused", "the relay refuses some recipients for good", refuse_some_recipients, refuses=True, held=False
    ),
    Scene(
        "certificate expired",
        "the relay's certificate has expired, until it is renewed",
        let_certificate_expire,
        secure=True,
        uncounted=True,
        held=False,
    ),
    Scene("drained", "the worker is told to stop in mid-mail, three times", drain),
    Scene("told to stop twice", "SIGTERM twice while the relay has not answered", terminate_twice),
    Scene("group told to stop", "SIGTERM to the worker and its children, in mid-mail", terminate_group),
    Scene(
        "clock forward", "the clock steps an hour forward, back, and forward", step_clock(HOUR, 0, HOUR), clocked=True
    ),
    Scene("clock back", "the clock steps an hour back, forward, and back", step_clock(-HOUR, 0, -HOUR), clocked=True),
    Scene(
        "clock back, mail put off",
        "the clock steps an hour back while mail that was put off waits",
        step_clock(-HOUR, put_off=True),
        settings={"RETRY_SCHEDULE": QUICK},
        clocked=True,
        held=False,
    ),
    Scene("machine paused", "a worker stands still for two minutes, its mail accepted", pause_machine),
]

REPLIES_LOST = {  # what the request holds whose reply is lost
    "accept": (b"EVALSHA", b"tasks.deliver"),
    "claim": (b"EVALSHA", b"rq:failed:email"),
    "the mark before the final dot": (b"EVALSHA", b"in_doubt"),
    "settle": (b"EVALSHA", b"settled_at"),
    "RQ's bookkeeping": (b"EXEC", b"rq:finished:email"),
}

TROUBLE: dict[str, tuple[str, Play]] = {  # no mail's fault, so it costs none an attempt
    "relay hangs": ("the relay lets us connect and says nothing", relay_says_for(8, GREETING=hang)),
    "relay drips": (
        "the relay says one byte a second",
        relay_says_for(8, GREETING=drip(b"220 relay.example ESMTP and so on and on\r\n", 1)),
    ),
    "relay throttles": ("the relay says 454 for a while", relay_says_for(5, MAIL="454 4.7.0 rate exceeded")),
    "login refused": ("the relay says 535 for a while", relay_says_for(5, AUTH="535 5.7.8 not now")),
    "relay closes": (
        "the relay says 421 in mid-session and hangs up",
        relay_says_for(5, RCPT=last_words("421 4.3.2 shutting down")),
    ),
}

HUNG_UP = {
    "relay cuts before the dot": ("in the middle of the body", relay_does_to_some(hang_up, BODY=lambda _: "")),
    "relay cuts after the dot": (
        "after the final dot, having accepted",
        relay_does_to_some(swallow, DOT=take_after(0)),
    ),
}


def _all() -> list[Scene]:
    scenes = [killed_at(point) for point in POINTS]
    for name, words in REPLIES_LOST.items():
        fault = f"the connection to Redis is cut so that the reply to {name} is lost"
        scenes.append(Scene(f"reply to {name} lost", fault, lose_replies(*words), proxied=True))
    for name, (fault, play) in TROUBLE.items():
        scenes.append(
            Scene(
                name,
                fault,
                play,
                settings={"RETRY_SCHEDULE": QUICK, "SMTP_TIMEOUT": "2s"},
                secure=name == "login refused",
                held=False,
                uncounted=name != "relay closes",
            )
        )
    for name, (place, play) in HUNG_UP.items():
        scenes.append(
            Scene(name, f"the relay hangs up {place}, for some mails", play, settings={"RETRY_SCHEDULE": QUICK})
        )
    return scenes + MORE


SCENES = {scene.name: scene for scene in _all()}


def play(stage: Stage) -> None:
    """The client submits, the fault happens; returns when both are over."""
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
