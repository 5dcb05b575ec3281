"""HTTP. Knows no SMTP and no key of Redis.

app.py         the routes, and what is around each
handlers.py    what each route answers
inbound.py     reports that a mail server hands over
mails.py       mails listed, canceled, moved
suppressions.py  the addresses that are not served
catalog.py     templates, domains and API keys, to read
docs.py        GET /openapi.json, which openapi.py makes of answers.py (types) and reference.py (docs/api.md)
access.py      who asks, and what that API key may do
context.py     what is known of the request that is being answered
body.py        a request's body: strict JSON, bounded
octets.py      files that come as lists of octets -> base64, while the body is read
hosts.py       what a page of another site may not send
errors.py      the one error shape; our exceptions in HTTP's words
middleware.py  request id, common headers, log line
metrics.py     GET /metrics
grammar.py     a request's bytes, read strictly and in linear time
server.py      Waitress, with small requests answered where they are read, and drained
"""
