"""What other packages offer by entry points: their names are checked where they come in."""

import re
from collections.abc import Collection
from importlib.metadata import EntryPoint, entry_points

from .errors import InvalidError

NAME = re.compile(r"[A-Za-z0-9_][\w.-]{0,99}", re.ASCII)
"""What can be written on a command line, in a list, and as the name of a file."""
NAME_RULE = "up to 100 letters, digits, '_', '-' and '.', and the last two not first"


def check_offers(group: str, own: Collection[str]) -> None:
    """Check the names of the entry points of a group, beside the suite's own.

    Raises InvalidError for a name that cannot be used, or that stands for two things: what is
    measured would not be what was named.
    """
    of_name: dict[str, EntryPoint] = {}
    for point in entry_points(group=group):
        wrong = None
        if not NAME.fullmatch(point.name):
            wrong = f"a name is {NAME_RULE}"
        elif point.name in own:
            wrong = "this suite has one of that name"
        elif of_name.setdefault(point.name, point) is not point:
            wrong = f"so does {_package(of_name[point.name])}"
        if wrong is not None:
            raise InvalidError(
                f"the package {_package(point)} offers {point.name!r} as an entry point of "
                f"{group}, and {wrong}: have it renamed, or uninstall the package"
            )


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist else point.value
