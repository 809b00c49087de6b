"""The one exception that means: the person at the command line gave something wrong."""


class InputError(ValueError):
    """A file, a name or an option that the user gave cannot be used.

    The message is one sentence: what was expected, what came, what to do. The command line prints
    `minirlhf: <message>` on stderr and exits with status 2, without a traceback. The mathematics in
    `nn/` and `rlhf/` raises plain ValueError and TypeError instead.
    """
