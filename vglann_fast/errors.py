"""The exceptions a user is meant to read."""


class VglannError(Exception):
    """A mistake the user can act on: a bad file, option or folder, or a full disk.

    The message is one line that names the file or option and says what to do. The command line prints it
    without a traceback and exits with status 2.
    """


class UnreadableError(VglannError):
    """A file that is there but cannot be read now: its disk, its share or its permissions are in the way.

    Nothing says that it is damaged, so no older or other file may take its place.
    """
