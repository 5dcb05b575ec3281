"""What people run beside the service. Nothing in the service imports it.

dev.py, lock.py, guard.py       bin/dev: all of it here, its data locked, its parts end with it
catcher.py, mailparts.py        its mail catcher: SMTP in and a page; what a mail's bytes hold
failing.py                      which mail the catcher refuses on purpose
install.py                      bin/install: the steps from a bare server to a running one, and every upgrade
server.py, release.py           the server they change, what of a clone is installed
redis_server.py, services.py    its Redis; the units, what is restarted
machines.py, gate.py, failover.py  several machines: what they share; Redis waits for the Sentinels; bin/failover
site.py, smtp_in.py, webhooks.py  the nginx site; mail by SMTP and webhooks, as their settings say
aof.py                          cuts what a crash left unfinished off Redis' append-only file
key.py, breaker.py              bin/key: makes, lists and revokes API keys; bin/breaker: shows and closes it
oauth.py                        bin/oauth: the right to send by token, once
top.py, rq_config.py            bin/top: the pages on a terminal; where the rq command finds Redis
sendmail.py, restore.py         bin/sendmail: a mail as sendmail takes it; bin/restore: what bin/backup has saved
dashboard.py, login.py          page/ and rq-dashboard behind a login that is slow to guess
page/                           the pages for people at /mail/
facts.py, condition.py          what is known now, and the one sentence that says whether all is well
watch.py, alerts.py, push.py    looks all the time, decides what people are told, and tells them
doctor.py, checks/              bin/doctor: what is wrong here, and the command that fixes it
"""
