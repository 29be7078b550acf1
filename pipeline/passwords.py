"""Passwords in URLs: never shown, never kept where others may read them."""

import re
from collections.abc import Iterable

from pipeline.errors import RunRefused


def without_password(text: str) -> str:
    """A text that shows no user and no password: nothing between the first // and the last @."""
    return re.sub(r"//.*@", "//***@", text, flags=re.DOTALL)


def refuse_passwords(words: Iterable[str], who: str) -> None:
    """Refuse a URL with a password among words that are written down or listed.

    Args:
        words: arguments, or values of variables.
        who: what they are of, for the message.

    Raises:
        RunRefused: naming the first, without its password.
    """
    for word in words:
        if re.search(r"://[^/\s@]*:[^/\s]*@", word):
            raise RunRefused(
                f"{who}: {without_password(word)} holds a password, which everyone who may list "
                "jobs and schedules could read; let the machine that runs the job know it"
            )
