"""What is said to a user."""

from __future__ import annotations

import errno


class UserError(Exception):
    """A mistake that the user can mend; the message is one line that says how."""


def in_words(error: OSError, where: object) -> str:
    """One line of what went wrong with a file. where: of an error that names none."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    mend = "; what was there before is unharmed, so make room and try again" if full else ""
    return f"could not read or write {error.filename or where}: {error.strerror or error}{mend}"
