"""How a mail leaves. Knows no mail: it carries an envelope and bytes to the relay.

verdict.py   phase + reply -> what it means; the one judgement
envelope.py  a mail as SMTP writes it: commands, lines
relay.py     where the relay is, and the way to it
session.py   one connection to the relay and the mails that go over it: begin, finish
auth.py      AUTH: which mechanisms, and what each says
pool.py      sessions that are kept for the next mail, and every conversation's deadline
pacing.py    a relay's rate and breaker, shared by all workers
"""
