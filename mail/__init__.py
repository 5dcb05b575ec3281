"""What an e-mail is and what becomes of it. Knows no HTTP and, but for imap.py, no socket.

address.py   a mailbox, checked
request.py   what a caller may ask for (forms.py, unsubscribe.py: the forms in which real clients write a field -> ours)
moments.py   a time as clients write it (due.py: held against the clock)
templates.py templates on disk -> subject, text, html
message.py   Message, its stored form, and the draft that the outbox accepts
draft.py     a request's body -> a draft: checked, its template rendered, composed
posted.py    Message -> the fields of POST /emails, for an upstream (parsed.py: of a mail that came by SMTP)
mime.py      Message -> bytes (plain.py: html -> the text beside it; raw.py: a mail as it came by SMTP; dkim.py: signed)
store.py     the mails in Redis: names of keys, how scripts are run
states.py    the states, what follows what, and BECOME: the one place where a state changes
outbox.py    the mails together: accept, claim, cancel, move, requeue
reader.py    what is kept of them, for those who ask (attachments.py: the files; suppression.py: addresses not served)
index.py     the index of all mails, by state, recipient, tag and cause (listing.py, causes.py: its mails)
claim.py     one attempt's hold on one mail: mark, settle (sweep.py: mails that got stuck, queued again or given up)
delivery.py  one attempt, top to bottom (routes.py: which relay the mail goes to)
reports.py   a bounce or complaint as it is read (verp.py, bounces.py: of which mail; mailboxes.py, imap.py: looked for)
counters.py  what is counted for ever, and how long things took (figures.py: the same by minute and hour)
"""
