"""RQ on Redis: everything that leans on their inside is here, and nothing else does.

connection.py  the client, Lua scripts, and what Redis' errors mean to a caller
heartbeat.py   leases and the one thread that renews them
jobs.py        accept, requeue, cancel, read: seen from the side that submits
health.py      the state of the queues, for readyz, metrics and the doctor
workers.py     what is changed in RQ's workers
offer.py       @task: what `POST /jobs` may call
"""
