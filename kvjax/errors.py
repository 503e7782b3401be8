"""The one error that users see."""


class InputError(ValueError):
    """What a user gave cannot be used; the message is one clear line.

    Command lines print the message on stderr and exit with status 2.
    """
