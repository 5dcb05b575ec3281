"""Keeps RQ and Redis to itself: only this room imports them, or depends on their inside.

table.py       the queues, a row each
keys.py        RQ's keys in Redis, by RQ's own names
connection.py  the client, Lua scripts, and the meaning of Redis' errors
primary.py     where the primary is, by Sentinels; replication.py: whether replicas have what was written
heartbeat.py   leases and the one thread that renews them
jobs.py        accept, requeue, cancel, read
running.py     what a job that runs asks of RQ
acceptance.py  what is accepted, of several requests in one round trip
health.py      the state of the queues, for readyz, metrics and the doctor
overview.py    who works on what, for people; pause and resume
failures.py    which jobs failed, and of what, for people
bulk.py        bulk mail, let into the queue as far as that is short
workers.py     RQ's workers and scheduler, changed
senders.py     the threads of the e-mail worker; executions.py: their jobs, taken and ended in one step
pipelining.py  a client whose commands from many threads go to Redis together
quarantine.py  jobs that RQ cannot read, set aside so that the others go on
cron.py        tasks that are queued by themselves; limits.py: how often something may be done, by all processes
offer.py       @task: what `POST /jobs` may call
"""
