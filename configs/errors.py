"""The base of every error that means bad input rather than a bug."""


class UserError(ValueError):
    """Something the user gave does not hold; the command line prints it and exits with status 2.

    The message is one sentence or two: what must hold, what was found, what to do.
    """


class ConfigError(UserError):
    """A configuration file or a KEY=VALUE override is wrong; the message names the full key."""
