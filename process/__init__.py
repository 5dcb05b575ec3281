"""Holds what every process needs.

log.py        logs one line per event, with names from a closed list
sd_daemon.py  speaks sd_notify and sd_listen_fds
env_file.py   reads NAME=value lines, strictly
guesses.py    counts wrong logins by address
resources.py  how many files a process may open, how much memory it may keep
prefork.py    one process that watches, several that serve on its sockets
"""
