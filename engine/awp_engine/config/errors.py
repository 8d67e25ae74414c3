"""What a user can mend."""


class UserError(Exception):
    """Something given cannot be used; the message is one line: what was wrong, what was expected, what to do."""
