"""The one exception that the command line shows as a line instead of a traceback."""


class UserError(Exception):
    """Something the user can put right: a wrong argument, a missing file, a corrupt checkpoint.

    Args:
        message: what was expected and what came.
        exit_code: exit status of the process.
    """

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code
