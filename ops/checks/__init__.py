"""The doctor's checks: table.py lists them, findings.py says what a finding is, each other file checks one subject.

target.py, system.py            what is examined; the operating system's answers
packages.py, configuration.py   Python and its packages; settings as the services see them, and file modes
store.py, replication.py        Redis; its Sentinels and replicas
flow.py                         workers, queue, breaker, and one mail sent the whole way
relay.py, replies.py            the relay up to its login, and what its refusals mean
submission.py                   the ports where mail is taken by SMTP, and their certificate
alerts.py, webhooks.py          whether somebody is told; whether your application is
mailboxes.py                    the mailboxes of reports and of sent mail
units.py, machine.py, names.py  systemd; nginx, ports and clock; SPF and DMARC of MAIL_FROM
"""
