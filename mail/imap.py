"""A folder of a mailbox, by IMAP: what is new in it, and whether a mail is there. Never deletes or moves a thing.

Imports imap-tools only where a folder is opened: few have one. RFC 3501.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote, urlsplit

TIMEOUT = 10  # seconds for one answer
QUOTABLE = re.compile(r'<[^\x00-\x20\x7f-\U0010ffff"\\<>]{1,900}>')


class Unreachable(Exception):
    """The folder cannot be used. The text says why, and holds no secret."""


class Folder:
    """An open folder. `client` is imaplib's."""

    def __init__(self, mailbox: Any, name: str) -> None:
        self.mailbox = mailbox
        self.name = name

    @property
    def validity(self) -> str:
        """Returns what the folder's numbers hold for: another one, and they are about other mails."""
        known: Any = self.mailbox.client.response("UIDVALIDITY")[1]
        return str(known[0].decode(errors="replace")) if known and known[0] else ""

    def newer_than(self, uid: int) -> list[int]:
        """Returns the numbers of all mails that came later, the oldest first."""
        found = sorted(map(int, self.mailbox.uids(f"UID {uid + 1}:*", charset=None)))
        return [one for one in found if one > uid]  # a server names the last of all, if there is no other

    def fetch(self, uid: int, size: int) -> bytes | None:
        """Returns the first `size` bytes of a mail, which stays unread; b"" for one that is gone, None for one that the
        server does not give at the moment."""
        status, answer = self.mailbox.client.uid("FETCH", str(uid), f"(BODY.PEEK[]<0.{size}>)")
        if status != "OK":
            return None
        pieces = [one[1] for one in answer if isinstance(one, tuple)]
        return bytes(pieces[0]) if pieces else b""

    def mark_read(self, uid: int) -> None:
        self.mailbox.client.uid("STORE", str(uid), "+FLAGS.SILENT", r"(\Seen)")

    def has(self, message_id: str) -> bool:
        """Returns whether a mail with this Message-ID is there."""
        if not QUOTABLE.fullmatch(message_id):
            return False
        return bool(self.mailbox.uids(f'HEADER Message-ID "{message_id}"', charset=None))


@contextmanager
def opened(url: str, readonly: bool = False, timeout: float = TIMEOUT) -> Iterator[Folder]:
    """Opens the folder that a URL names (settings.check_combinations). Raises `Unreachable`, also in the body."""
    import imap_tools
    from imap_tools.errors import ImapToolsError, MailboxFolderSelectError, MailboxLoginError

    at = urlsplit(url)
    user, password = unquote(at.username or ""), unquote(at.password or "")
    name = unquote(at.path.strip("/")) or "INBOX"
    try:
        if at.scheme == "imaps":
            mailbox: Any = imap_tools.MailBox(
                at.hostname or "", at.port or 993, timeout=timeout, ssl_context=ssl.create_default_context()
            )
        else:
            mailbox = imap_tools.MailBoxUnencrypted(at.hostname or "", at.port or 143, timeout=timeout)
        login = mailbox.login if (user + password).isascii() else mailbox.login_utf8
        with mailbox:
            login(user, password, initial_folder=None)
            mailbox.folder.set(name, readonly)
            yield Folder(mailbox, name)
    except MailboxLoginError:
        raise Unreachable("the server refuses the login") from None
    except MailboxFolderSelectError:
        raise Unreachable("the server has no such folder, or does not open it") from None
    except ssl.SSLCertVerificationError as error:
        raise Unreachable(f"its certificate is not valid: {error.verify_message}") from None
    except OSError as error:
        raise Unreachable(f"it cannot be reached: {error.strerror or type(error).__name__}") from None
    except (ImapToolsError, mailbox_error()) as error:
        raise Unreachable(f"the server does not do what is asked: {type(error).__name__}") from None


def mailbox_error() -> type[Exception]:
    from imaplib import IMAP4

    return IMAP4.error
