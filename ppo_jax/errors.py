"""The one exception for what a user can mend: its text is the whole message, printed without a traceback."""


class UserError(Exception):
    """Got, expected, where, and what to do, in one or a few lines."""
