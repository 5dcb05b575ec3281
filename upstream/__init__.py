"""How a mail leaves by HTTP. Knows no mail: it posts an object under a key, again and again until it is answered.

client.py  one upstream: POST /emails with an Idempotency-Key, and what it said
answer.py  status, headers and body of an answer -> one reply, which smtp.policy judges
wire.py    connections that are kept, with one deadline for all of a request
"""
