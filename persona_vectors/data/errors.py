"""The one exception for input that a user can mend."""


class InputError(ValueError):
    """Raise for input that a user can mend: says what was given, what is allowed and what to do."""
