"""The scenes by name: each a fault in one sentence, who does it (chaos/faults.py), and what its stage needs.

Scenes that differ by data only are in tables: the points at which a worker dies, the replies of Redis that are lost,
the words of a relay. A promise beyond the common one is in its fields: a limit in seconds, uncounted attempts.
"""

from __future__ import annotations

import signal
from functools import partial
from typing import Any

from chaos import standby
from chaos.faults import (
    ACCEPT,
    HOUR,
    STEPS_TO,
    Play,
    answer_in_real_words,
    clean_at_once,
    cut_around_the_dot,
    cut_power,
    deny_two_for_ever,
    drain,
    flush_scripts,
    greylist,
    kill_and_step_clock_back,
    kill_dashboard,
    kill_front,
    kill_front_unheard,
    kill_in_maintenance,
    kill_parent,
    kill_senders,
    kill_workers_at_random,
    let_certificate_expire,
    lose_replies,
    pause_machine,
    poison,
    put_everybody_off,
    refuse_some,
    refuse_some_recipients,
    relay_does_to_some,
    relay_says_for,
    restart_redis,
    slowly,
    step_clock,
    take_relay_away,
    take_relay_away_for_an_hour,
    terminate_group,
    terminate_twice,
    trouble_redis,
    use_up_the_quota,
    wait_for_death,
)
from chaos.stage import QUICK, Scene
from tests.killed_worker import POINTS
from tests.redis_troubles import configured, replica_of_the_dead, stopped
from tests.scripted_relay import drip, hang, last_words, reset, swallow, take_after


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
    )


# So much mail for so few senders that they take some ahead.
UNDER_LOAD: dict[str, Any] = {"settings": {"WORKER_CONCURRENCY": "2"}, "pipelined": True, "times": 10}
TWO = {"WORKER_CONCURRENCY": "4", "WORKER_PROCESSES": "2"}
MORE = [
    Scene("workers killed", "two e-mail workers are killed at random moments", kill_workers_at_random, workers=2),
    Scene(
        "workers killed under load", "the same with mail taken ahead", kill_workers_at_random, workers=2, **UNDER_LOAD
    ),
    Scene(
        "one of two processes killed",
        "a worker's child is killed four times",
        kill_senders,
        **UNDER_LOAD | {"settings": TWO},
    ),
    Scene(
        "parent of two processes killed",
        "a worker with two children is killed",
        kill_parent,
        **UNDER_LOAD | {"settings": TWO},
    ),
    Scene(
        "relay cuts around the dot",
        "the relay hangs up where a dot comes with the next mail's commands",
        cut_around_the_dot,
        **UNDER_LOAD | {"settings": {"WORKER_CONCURRENCY": "2", "RETRY_SCHEDULE": QUICK}},
    ),
    Scene("API killed", "the API is killed four times while it accepts", kill_front, held=False),
    Scene(
        "API killed before its answer", "the API stores a mail and dies", kill_front_unheard, held=False, proxied=True
    ),
    Scene("submission killed", "the process for SMTP is killed four times", kill_front, held=False, by_smtp=True),
    Scene(
        "submission killed before its answer",
        "the process for SMTP stores a mail and dies",
        kill_front_unheard,
        held=False,
        by_smtp=True,
        proxied=True,
    ),
    Scene(
        "Redis killed under SMTP",
        "Redis is killed three times while mail comes by SMTP",
        restart_redis(signal.SIGKILL, times=3),
        held=False,
        by_smtp=True,
    ),
    Scene("dashboard killed", "the dashboard is killed twice", kill_dashboard, held=False),
    Scene("power cut", "API, workers and Redis are killed at the same moment", cut_power, workers=2),
    Scene("poison mail", "a mail kills its worker each time", poison, workers=0),
    Scene("Redis killed", "Redis is killed three times and started again", restart_redis(signal.SIGKILL, times=3)),
    Scene("Redis restarted", "Redis is told to stop and started again", restart_redis(signal.SIGTERM), held=False),
    Scene("Redis away", "Redis is away for 45 seconds", restart_redis(signal.SIGKILL, 45)),
    Scene("Redis silent", "Redis answers nothing for 20 seconds", trouble_redis(stopped, 20)),
    Scene("Redis full", "Redis is out of memory for 8 seconds", trouble_redis(partial(configured, maxmemory=1), 8)),
    Scene("Redis read-only", "Redis is a replica for 8 seconds", trouble_redis(replica_of_the_dead, 8)),
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
        "two denied for ever",
        "the relay denies two mails of many, each time, as Postfix does",
        deny_two_for_ever,
        settings={"RETRY_SCHEDULE": "1s,1s,1s"},
        held=False,
        times=25,
        limit=30,
    ),
    Scene(
        "real words",
        "the relay answers half of all commands as real relays do in trouble",
        answer_in_real_words,
        settings={"RETRY_SCHEDULE": QUICK},
        held=False,
    ),
    Scene(
        "quota used up",
        "the account's daily quota, said with 554, is used up for a while",
        use_up_the_quota,
        uncounted=True,
        held=False,
    ),
    Scene(
        "certificate expired",
        "the relay's certificate has expired, until it is renewed",
        let_certificate_expire,
        secure=True,
        uncounted=True,
        held=False,
    ),
    Scene(
        "drained",
        "the worker is told to stop in mid-mail, three times",
        drain,
        settings={"WORKER_CONCURRENCY": "2"},
    ),
    Scene(
        "processes told to stop",
        "a worker of two processes is told to stop in mid-mail, three times",
        drain,
        **UNDER_LOAD | {"settings": TWO},
    ),
    Scene("told to stop twice", "SIGTERM twice while the relay has not answered", terminate_twice),
    Scene("group told to stop", "SIGTERM to the worker and its children, in mid-mail", terminate_group),
    Scene(
        "clock forward",
        "the clock steps an hour forward, back, and forward, with mail in the hands of two workers",
        step_clock(HOUR, 0, HOUR),
        workers=2,
        clocked=True,
    ),
    Scene("clock back", "the clock steps an hour back, forward, and back", step_clock(-HOUR, 0, -HOUR), clocked=True),
    Scene(
        "clock back, mail put off",
        "the clock steps an hour back while mail that was put off waits, and is put right",
        step_clock(-HOUR, 0, put_off=True),
        settings={"RETRY_SCHEDULE": QUICK},
        clocked=True,
        held=False,
    ),
    Scene(
        "clock back, worker killed",
        "the clock steps an hour back when a worker has just been killed",
        kill_and_step_clock_back,
        clocked=True,
        held=False,
    ),
    Scene("machine paused", "a worker stands still for two minutes, its mail accepted", pause_machine),
]

REPLIES_LOST = {  # what the request holds whose reply is lost
    "accept": ACCEPT,
    "the mark before the final dot": (b"EVALSHA", b"in_doubt"),
    "settle": (b"EVALSHA", b"settled_at"),
    "the step that takes a job": (b"EVALSHA", b"rq:queue:email:intermediate"),
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
    "relay cuts before the dot": ("in the middle of the body", relay_does_to_some(reset, BODY=lambda _: "")),
    "relay cuts after the dot": (
        "after the final dot, having accepted",
        relay_does_to_some(swallow, DOT=take_after(0)),
    ),
}


def _all() -> list[Scene]:
    scenes = [killed_at(point) for point in POINTS]
    for name, words in REPLIES_LOST.items():
        fault = f"the connection to Redis is cut so that the reply to {name} is lost"
        said = b"claimed" if "takes a job" in name else b""
        scenes.append(Scene(f"reply to {name} lost", fault, lose_replies(*words, said=said), proxied=True))
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
    words = REPLIES_LOST["the step that takes a job"]
    play = slowly(lose_replies(*words, said=b"claimed", every=4))
    scenes.append(
        Scene("replies lost under load", "the same, of the commands of several", play, proxied=True, **UNDER_LOAD)
    )
    return scenes + MORE + standby.SCENES


SCENES = {scene.name: scene for scene in _all()}
