"""The one exception that the command line prints as a single line."""


class UserError(ValueError):
    """A mistake in what the user gave: names the field, the rule, the value seen and the next step, on one line."""
