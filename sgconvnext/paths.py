"""Paths as a shell reads them, where no shell does: in ``out=~/runs``, ``--plot=~/a.png`` and YAML files."""

import os


def expand(text: str) -> str:
    """The path with the home folder in place of ``~`` or ``~user`` at its start.

    Raises:
        ValueError: there is no such user, or no home folder; a folder called ``~`` is never made.
    """
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        user = text[1:].partition("/")[0]
        why = f"there is no user {user!r}" if user else "the home folder is not known"
        raise ValueError(f"{text!r}: {why}; write the path in full, or './{text}' for a folder of that name")
    return expanded
