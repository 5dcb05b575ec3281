"""html -> the text that stands beside it, for readers who see no html. Pure, in linear time, without recursion.

Reads html as browsers do (https://html.spec.whatwg.org/multipage/parsing.html#tokenization), as far as its words,
lines, lists and links go. Python's own HTMLParser needs six seconds for eight thousand times `<a `, and so do the
libraries that stand on it; those on lxml take seven megabytes of each worker.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

LONGEST = 2**20  # characters
TAG = re.compile(r"<(/?)([a-zA-Z][^\s/>]*)")
ATTRIBUTE = re.compile(r"""[\s/]*([^\s/>][^\s/>=]*)(?:\s*=\s*("[^"]*"|'[^']*'|[^\s>]*))?""")
END_OF_TAG = re.compile(r"[\s/]*>?")
REFERENCE = re.compile(r"&(?:#[0-9]{1,7}(?![0-9])|#[xX][0-9a-fA-F]{1,6}(?![0-9a-fA-F])|[a-zA-Z][a-zA-Z0-9]{1,31});?")
UNSEEN = {name: re.compile(rf"</{name}(?=[\s/>])", re.IGNORECASE) for name in ("script", "style", "textarea", "title")}
LINK = re.compile(r"(?:https?|mailto|tel):[^\s<>]+", re.IGNORECASE)
# A mail's html has no control characters. These stand for a <br>, the begin or end of a block on a line of its own, of
# one with an empty line around, a space that is kept, and the end of "- ".
LINE, BLOCK, PARAGRAPH, SPACE, ITEM = "\x01\x02\x03\x04\x05"
# fmt: off
PARAGRAPHS = ("p", "h1", "h2", "h3", "h4", "h5", "h6", "dl", "table", "blockquote", "pre", "hr", "figure")
BLOCKS = ("address", "article", "aside", "center", "dd", "details", "div", "dt", "fieldset", "figcaption", "footer",
          "form", "header", "li", "main", "nav", "section", "summary", "tr")
# fmt: on
AROUND = dict.fromkeys(PARAGRAPHS, PARAGRAPH) | dict.fromkeys(BLOCKS, BLOCK)
SPACES = re.compile(r"\s{2,}|[^\S ]")
FILLED = re.compile(r"[\s\u034f\u200b-\u200d\u2060\ufeff]{2,}")  # so the preview of a mail is kept empty
BREAKS = re.compile(f" ?(?:[{LINE}{BLOCK}{PARAGRAPH}] ?)+")
AFTER_ITEM = re.compile(f"{ITEM}[ {LINE}{BLOCK}{PARAGRAPH}]*")


def text_beside(text: str | None, html: str | None) -> str | None:
    """Returns the text that goes out: the mail's own, also an empty one, or if it has none, that of its html."""
    return text_of(html) if text is None and html else text


def text_of(html: str) -> str:
    """Returns the text of a mail's html: none if it shows no word, or is so long that nobody reads it as text."""
    if len(html) > LONGEST:
        return ""
    shown = _Shown()
    for kind, word, attributes in _tokens(html):
        if kind == "text":
            shown.add(word)
        elif kind == "start":
            shown.start(word, attributes)
        else:
            shown.end(word)
    shown.end("a")
    text = AFTER_ITEM.sub("", _collapsed("".join(shown.pieces)).strip(" "))
    text = BREAKS.sub(_line_ends, text).replace(SPACE, " ")
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    return re.sub("\n{3,}", "\n\n", text).strip("\n")


def _line_ends(found: re.Match[str]) -> str:
    return "\n\n" if PARAGRAPH in found[0] or found[0].count(LINE) > 1 else "\n"


def _collapsed(text: str) -> str:
    if not text.isascii():
        text = FILLED.sub(lambda found: " " if re.search(r"\s", found[0]) else found[0], text)
    return SPACES.sub(" ", text)


def _tokens(html: str) -> Iterator[tuple[str, str, dict[str, str]]]:
    """Yields ("text", words, {}), ("start", tag, attributes) and ("end", tag, {})."""
    at = 0
    while (begin := html.find("<", at)) >= 0:
        yield "text", _unescaped(html[at:begin]), {}
        if html.startswith(("<!", "<?"), begin):
            closes = "-->" if html.startswith("<!--", begin) else ">"
            end = html.find(closes, begin + 2)
            at = end + len(closes) if end >= 0 else len(html)
        elif tag := TAG.match(html, begin):
            name, attributes, at = tag[2].lower(), dict[str, str](), tag.end()
            while found := ATTRIBUTE.match(html, at):
                attributes.setdefault(found[1].lower(), _value(found[2] or ""))
                at = found.end()
            at = END_OF_TAG.match(html, at).end()  # type: ignore[union-attr]  # also matches nothing
            yield "end" if tag[1] else "start", name, attributes
            if not tag[1] and name in UNSEEN:
                hidden = UNSEEN[name].search(html, at)
                at = hidden.start() if hidden else len(html)
        else:
            yield "text", "<", {}
            at = begin + 1
    yield "text", _unescaped(html[at:]), {}


def _value(written: str) -> str:
    return _unescaped(written[1:-1] if written[:1] in ("'", '"') and written[1:].endswith(written[0]) else written)


def _unescaped(text: str) -> str:
    if "&" not in text:
        return text
    from html import unescape  # here, for its list of names takes 0.4 MB, and many mails need none

    return REFERENCE.sub(lambda found: unescape(found[0]), text)


class _Shown:
    """Collects what a reader sees."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.lists: list[int] = []  # those that are open: the last number in each, -1 for one without numbers
        self.preformatted = 0
        self.link, self.begin = "", 0  # where it leads, and the first of its pieces

    def add(self, text: str) -> None:
        self.pieces.append(re.sub(r"\s", SPACE, text.replace("\n", LINE)) if self.preformatted else text)

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        self.pieces.append({"br": LINE, "td": " ", "th": " "}.get(tag) or AROUND.get(tag, ""))
        if tag == "a":
            self.end("a")
            self.link, self.begin = attributes.get("href", "").strip(), len(self.pieces)
        elif tag == "img":
            self.pieces.append(attributes.get("alt", ""))
        elif tag == "hr":
            self.pieces += ["-" * 20, PARAGRAPH]
        elif tag == "pre":
            self.preformatted += 1
        elif tag in ("ul", "ol"):
            self.pieces.append(BLOCK if self.lists else PARAGRAPH)
            self.lists.append(0 if tag == "ol" else -1)
        elif tag == "li":
            self.pieces += [SPACE * 2 * min(len(self.lists) - 1, 9), self._dash(), SPACE, ITEM]

    def _dash(self) -> str:
        if not self.lists or self.lists[-1] < 0:
            return "-"
        self.lists[-1] += 1
        return f"{self.lists[-1]}."

    def end(self, tag: str) -> None:
        if tag == "a":
            label = _collapsed("".join(self.pieces[self.begin :])).strip(f" {LINE}{BLOCK}{PARAGRAPH}").rstrip("/")
            if LINK.fullmatch(self.link) and label not in (self.link.rstrip("/"), re.sub("^[a-z]+:", "", self.link)):
                self.pieces.append(f" <{self.link}>")
            self.link, self.begin = "", len(self.pieces)
        elif tag == "pre":
            self.preformatted = max(0, self.preformatted - 1)
        elif tag in ("ul", "ol") and self.lists:
            self.lists.pop()
            self.pieces.append(BLOCK if self.lists else PARAGRAPH)
        self.pieces.append({"td": SPACE, "th": SPACE}.get(tag) or AROUND.get(tag, ""))
