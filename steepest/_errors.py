"""The error that is the user's to mend, not ours."""


class UserError(ValueError):
    """Something the user gave is wrong: the message names it, says what it was, and what would be right.

    The command line prints such a message on one line and exits with code 2.
    """
