"""RQ on Redis: everything that leans on their inside is here, and nothing else does.

table.py       the queues, a row each
keys.py        RQ's keys in Redis, by RQ's own names
connection.py  the client, Lua scripts, and what Redis' errors mean to a caller
heartbeat.py   leases and the one thread that renews them
jobs.py        accept, requeue, cancel, read: seen from the side that submits
health.py      the state of the queues, for readyz, metrics and the doctor
workers.py     what is changed in RQ's workers
quarantine.py  jobs that RQ cannot read, set aside so that the others go on
offer.py       @task: what `POST /jobs` may call
"""
