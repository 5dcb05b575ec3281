"""The pages for people at /mail/, in the dashboard's process: what was sent, to whom, what failed and why.

app.py       the routes; headers, errors, the two files of style and script
view.py      what every page is given, and how it is rendered (html/)
words.py     times, numbers and addresses as a person reads them
charts.py    figures over time as SVG
activity.py  the mails, newest first
email.py     one mail, and what a person may do about it
timeline.py  what happened to a mail, step by step
advice.py    what it means that a mail failed, and what fixes it
audit.py     who did what
"""
