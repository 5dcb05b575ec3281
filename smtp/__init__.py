"""How a mail leaves. Knows no mail: it carries an envelope and bytes to the relay.

policy.py    what replies mean: the one table, with its sources
verdict.py   one reply, judged: verdict, pause, what it leaves of a session
envelope.py  a mail as SMTP writes it: commands, lines
relay.py     where the relay is, and the way to it
session.py   one connection to the relay and the mails that go over it: begin, finish
auth.py      AUTH: which mechanisms, and what each says
oauth.py     one request to a token server
tokens.py    the token that all workers log in with
pool.py      sessions that are kept for the next mail, and every conversation's deadline
tally.py     how many sessions all workers have
pacing.py    a relay's rate and breaker, shared by all workers
published.py which relays there are, for those who may not see RELAYS
"""
