"""The one exception that means: the person at the command line gave something wrong."""

LONGEST = 600  # characters of a message, whatever it quotes


class InputError(ValueError):
    """A file, a name or an option that the user gave cannot be used.

    The message is one sentence on one line: what was expected, what came, what to do. The command
    line prints `minirlhf: <message>` on stderr and exits with `status`, without a traceback. The
    mathematics in `nn/` and `rlhf/` raises plain ValueError and TypeError instead. `resume`: how a
    run that it stops goes on, "" or with another "reward"; None: it says so itself, or not at all.
    """

    def __init__(self, message: str, *, resume: str | None = "", status: int = 2):
        self.resume, self.status = resume, status
        if len(message) > LONGEST:
            message = f"{message[: LONGEST - 243]}...{message[-240:]}"
        super().__init__("".join(c if c.isprintable() else "\ufffd" for c in message))
