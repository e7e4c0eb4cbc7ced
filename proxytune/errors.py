"""The exception that the command line prints as one line, and how values are shortened in it."""

import reprlib

LONGEST = 2000  # characters of a message; ordinary messages are far shorter

_repr = reprlib.Repr()
_repr.maxstring, _repr.maxother = 80, 80


class UserError(ValueError):
    """A mistake in the user's input: names the field, the rule, the value seen and the next step, on one line.

    The middle of a message that is longer than `LONGEST` is left out: the field is at its beginning, the next step at its end.
    """

    def __init__(self, message: str):
        super().__init__(shortened(message))


def brief(value: object) -> str:
    """The value as Python writes it, on one line, cut where it is long."""
    try:
        return _repr.repr(value).replace("\n", " ")  # of a tensor, for example: in texts they are escaped
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return "a number of thousands of digits"


def shortened(text: str, longest: int = LONGEST) -> str:
    """The text without its middle where it is longer than `longest`."""
    return text if len(text) <= longest else f"{text[: longest * 3 // 4]} … {text[-longest // 4 :]}"
