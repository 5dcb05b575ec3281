"""What people run beside the service. Nothing in the service imports it.

dev.py, catcher.py  bin/dev: all of it on this machine, with a mail catcher
install.py          bin/install: from a bare server to a running one, and every upgrade
key.py              bin/key: makes, lists and revokes API keys
dashboard.py        rq-dashboard behind a login
doctor.py, checks/  bin/doctor: what is wrong here, and the command that fixes it
"""
