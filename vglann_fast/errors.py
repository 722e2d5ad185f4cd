"""The one exception a user is meant to read."""


class VglannError(Exception):
    """A mistake the user can act on: a bad file, option or folder, or a full disk.

    The message is one line that names the file or option and says what to do. The command line prints it
    without a traceback and exits with status 2.
    """
