"""The error a command ends with when what it was given can't work."""


class Refusal(Exception):
    """One line for the user: what was given, what is accepted. The command prints it and exits with status 2."""
