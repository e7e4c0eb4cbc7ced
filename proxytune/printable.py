"""Text of others (a model, a data file, a folder's name) made fit for a terminal: what would act on it, or hide in it, is shown as an escape."""

import re
import unicodedata

from proxytune.errors import shortened

# Control and format characters (bidi overrides, zero width, tags), lone surrogates, separators of lines and paragraphs.
HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
# Two format characters are spelling between letters of some scripts and within emoji, not beside ASCII.
_SUSPECT = re.compile(r"(?P<joined>(?<=[^\x00-\x7f])[\u200c\u200d](?=[^\x00-\x7f]))|[^\x20-\x7e]")


def printable(text: str, keep: str = "") -> str:
    r"""The text with every character that is no visible sign written as its escape (`\x1b`, `\u202e`); those of `keep` stay.

    All letters, marks, symbols and spaces stay as they are. Not covered: signs that look alike; telling an escape from the same
    characters in the text.
    """

    def shown(found: re.Match[str]) -> str:
        sign = found[0]
        if found["joined"] or sign in keep or unicodedata.category(sign) not in HIDDEN:
            return sign
        return ascii(sign)[1:-1]

    return _SUSPECT.sub(shown, text)


def one_line(text: str) -> str:
    """Printable, on one line, and no longer than a message is."""
    return shortened(printable(" ".join(text.split())))
