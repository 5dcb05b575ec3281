"""How a mail leaves. Knows no mail: it carries an envelope and bytes to the relay.

verdict.py  phase + reply -> what it means; the one judgement
session.py  one connection to the relay and the mails that go over it
pool.py     sessions that are kept for the next mail, and every conversation's deadline
pacing.py   SMTP_RATE and the breaker, shared by all workers
"""
