"""What a user can cause, as one exception: what happened, where, and what to do about it."""

from __future__ import annotations


class CompressError(Exception):
    """An error that the user can act on; the command line prints it on one line and exits with 2.

    Args:
        what: what is wrong, with the number that shows it ("group size 128 does not divide in_features 576").
        where: the file, layer, option or setting it was found in.
        remedy: what to type or change instead.
    """

    def __init__(self, what: str, where: str = "", remedy: str = "") -> None:
        self.what = what
        self.where = where
        self.remedy = remedy
        super().__init__(self.line())

    def line(self) -> str:
        """The whole error on one line: "where: what; remedy"."""
        head = f"{self.where}: {self.what}" if self.where else self.what
        return f"{head}; {self.remedy}" if self.remedy else head


class Interrupted(CompressError):
    """The run was stopped on purpose (Ctrl-C) and can go on; the command line exits with 130."""
