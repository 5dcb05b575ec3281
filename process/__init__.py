"""What every process needs, whatever it does.

log.py        what we log: one line per event, with names from a closed list
sd_daemon.py  what systemd tells a process and hears from it (sd_notify, sd_listen_fds)
prefork.py    one process that watches, several that serve on its sockets
"""
