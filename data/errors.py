"""The one error that the data package raises for what a user can mend."""

import errno

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class DataError(ValueError):
    """Something is wrong with the data a user asked for.

    The message is one line: what is wrong, where, what was expected and how to mend it.
    """
