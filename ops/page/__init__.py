"""The pages for people at /mail/, in the dashboard's process: what was sent, to whom, what failed and why.

app.py       the routes; headers, errors, the two files of style and script
view.py      what every page is given, and how it is rendered (html/)
words.py     times, numbers and addresses as a person reads them
charts.py    figures over time as SVG
activity.py  the mails, newest first
system.py    relay, workers, queues, timed tasks, Redis; pause, resume, close the breaker
templates.py the templates, each with a preview
"""
