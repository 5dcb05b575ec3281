"""Plays faults on real processes and counts the mail afterwards: `python -m chaos`.

scenes.py            the scenes by name: each a fault in one sentence
standby.py           the scenes with two relays
faults.py            what is done to the processes, Redis, the relay or the clock
stage.py, proxy.py   the processes of one scene, and a way into their connections
upstream.py          two services in a row, by HTTP over a line that is cut: `python -m chaos.upstream`
ledger.py            what was sent once, doubled or lost
ha/                  several hosts that die or are cut off: `python -m chaos --ha`
"""
