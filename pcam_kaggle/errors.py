"""The one kind of error that is the user's to mend."""


class UserError(Exception):
    """Something the user can put right: the message names the file, id or key and what to do, in one line.

    The command line prints it without a traceback and exits with status 2.
    """
