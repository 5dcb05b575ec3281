"""The pages for people at /mail/, in the dashboard's process: what was sent, to whom, what failed and why.

app.py       the routes; headers, errors, the two files of style and script
view.py      what every page is given, and how it is rendered (html/)
words.py     times, numbers and addresses as a person reads them (charts.py: figures over time as SVG)
overview.py  the front page: the sentence, today beside yesterday, the charts
activity.py  the mails, newest first, and those that are searched for
search.py    what can be searched for, and how it is in a URL
scheduled.py the mails that wait for their time
suppressions.py  the addresses that are not served
failures.py  why mails and jobs failed, by cause; queues all of a cause again
system.py    relay, workers, queues, timed tasks, Redis; pause, resume, close the breaker
templates.py the templates, each with a preview
webhooks.py  the endpoints that are told what becomes of mails; test, replay
email.py     one mail, and what a person may do about it
timeline.py  what happened to a mail, step by step
advice.py    what it means that a mail failed, and what fixes it
audit.py     who did what, noted; actions.py shows it
"""
