"""Untrusted text (of a model, a data file, a folder's name) made safe for a terminal: control and hidden characters become escapes."""

import re
import unicodedata

from proxytune.errors import shortened

# Control and format characters (bidi overrides, zero width, tags), lone surrogates, separators of lines and paragraphs.
HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
# Two format characters are part of the spelling in some scripts and of emoji; beside ASCII they are not.
_SUSPECT = re.compile(r"(?P<joined>(?<=[^\x00-\x7f])[\u200c\u200d](?=[^\x00-\x7f]))|[^\x20-\x7e]")


def printable(text: str, keep: str = "") -> str:
    r"""The text with every invisible character written as its escape (`\x1b`, `\u202e`); characters of `keep` stay.

    All letters, marks, symbols and spaces stay as they are. Not covered: characters that look alike, and an escape that is
    written out in the text itself.
    """

    def shown(found: re.Match[str]) -> str:
        sign = found[0]
        if found["joined"] or sign in keep or unicodedata.category(sign) not in HIDDEN:
            return sign
        return ascii(sign)[1:-1]

    return _SUSPECT.sub(shown, text)


def one_line(text: str) -> str:
    """The text made printable, on one line, no longer than an error message."""
    return shortened(printable(" ".join(text.split())))
