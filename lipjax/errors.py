"""The error that a user can mend."""


class InputError(ValueError):
    """Bad input of the scripts: its message is one line that says what is wrong, where, and how to mend it."""
