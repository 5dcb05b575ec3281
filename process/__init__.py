"""Holds what every process needs.

log.py        logs one line per event, with names from a closed list
sd_daemon.py  speaks sd_notify and sd_listen_fds
env_file.py   reads NAME=value lines, strictly
values.py     the kinds of values that settings have, and how they are written
redis_url.py  what REDIS_URL says
api_keys.py   what an API key may do
grants.py     SMTP_OAUTH: what a login by token is made from
relays.py     RELAYS: several relays by name (webhooks.py: WEBHOOKS, the endpoints that are told what becomes of mails)
memory.py     how memory is kept and looked through
sockets.py    the sockets on which a process listens, and how many files it may open
version.py    which version this is
guesses.py    counts wrong logins by address
prefork.py    one process that watches, several that serve on its sockets
"""
