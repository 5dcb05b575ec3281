"""Several hosts on one machine, of which one dies or is cut off under load: `python -m chaos --ha`, as root.

network.py   the hosts: a network namespace each, on one switch, where they are cut off from one another
services.py  what runs on them, and is started again when it ends, as systemd would
stage.py     three Redis with a Sentinel each, two APIs, three workers; a relay and a client, whom no fault reaches
scenes.py    the scenes by name: what is done to which host
account.py   what was lost, doubled or forgotten, and for how long nothing went
__main__.py  the command, and the table
"""
