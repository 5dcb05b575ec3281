"""Webhooks out: what becomes of mails is posted to endpoints, signed. Knows no SMTP, and delays no mail.

__main__.py  the process (`python -m webhooks`)
endpoint.py  one endpoint: takes its events from Redis, posts them, and says what became of each
queue.py     the events of an endpoint in Redis: what waits, is due, was given up; and whether the endpoint answers
event.py     an event as it is posted: its body in Resend's shape, its id, its signatures
post.py      one HTTP POST: to no private address, within a deadline, its answer in a word

mail.states writes an event in the step in which the mail comes into its state, and only while webhooks.queue says that
an endpoint wants it.
"""
