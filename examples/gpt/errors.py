"""What is said to a user."""

from __future__ import annotations


class UserError(Exception):
    """A mistake that the user can mend; the message is one line that says how."""
