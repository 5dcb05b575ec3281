"""SMTP in: every program that can send mail hands it over here. Knows no HTTP, and no key of Redis.

__main__.py      the process: sockets, certificate, signals (`python -m submission`)
conversation.py  one client's connection: what of aiosmtpd is changed, and its bounds
handler.py       what each command is answered: login, sender, recipients, the mail
intake.py        a mail's bytes and its envelope -> the draft that the outbox accepts
"""
