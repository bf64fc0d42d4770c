"""Checks of arguments, each with a sentence: what is allowed and what was received.

TypeError for a value of another kind, ValueError for one that cannot be. `owner` is the object that
was called, or its name; the values come by their names, so one call checks all of a kind:

    integers(self, 1, channels=channels, emb_channels=emb_channels)
"""

import math
import reprlib
from collections.abc import Collection, Sequence
from numbers import Integral, Real
from typing import Any


def integers(owner: object, least: float, **values: Any) -> None:
    """Whole numbers of at least `least`. True and 3.0 are none."""
    for name, value in values.items():
        if not _is_integer(value):
            raise TypeError(f"{_name(owner)}: {name} must be an integer, got {received(value)}")
        if value < least:
            raise ValueError(f"{_name(owner)}: {name} must be at least {least}, got {value}")


def probabilities(owner: object, **values: Any) -> None:
    """Numbers in [0, 1)."""
    for name, value in values.items():
        _require_number(owner, name, value)
        if not 0 <= value < 1:
            raise ValueError(f"{_name(owner)}: {name} must lie in [0, 1), got {value!r}")


def numbers(owner: object, least: float, **values: Any) -> None:
    """Finite numbers of at least `least`."""
    for name, value in values.items():
        _require_number(owner, name, value)
        if not least <= value < math.inf:
            limit = "finite" if least == -math.inf else f"finite and at least {least:g}"
            raise ValueError(f"{_name(owner)}: {name} must be {limit}, got {value!r}")


def flags(owner: object, **values: Any) -> None:
    """True or False; 1 and 0, too, but no string: "False" would count as true."""
    for name, value in values.items():
        is_bool = type(value).__name__ in ("bool", "bool_")  # Python's or NumPy's
        if not is_bool and not (isinstance(value, int) and value in (0, 1)):
            raise TypeError(f"{_name(owner)}: {name} must be True or False, got {received(value)}")


def one_of(owner: object, allowed: Sequence[Any], **values: Any) -> None:
    """One of a few integers, strings, or None."""
    for name, value in values.items():
        comparable = value is None or isinstance(value, str) or _is_integer(value)
        if not comparable or value not in allowed:
            *others, last = map(repr, allowed)
            raise ValueError(
                f"{_name(owner)}: {name} must be {', '.join(others)} or {last}, got {value!r}"
            )


def integer_collections(owner: object, least: int, **values: Any) -> None:
    """Tuples, lists or sets of integers of at least `least`, empty ones too."""
    for name, value in values.items():
        if not isinstance(value, Collection) or not all(map(_is_integer, value)):
            raise TypeError(
                f"{_name(owner)}: {name} must be a tuple, list or set of integers, got "
                f"{received(value)}; convert strings with int()"
            )
        if any(item < least for item in value):
            raise ValueError(
                f"{_name(owner)}: {name} must hold integers of at least {least}, got {value!r}"
            )


def multipliers(owner: object, **values: Any) -> None:
    """Tuples or lists of positive finite numbers, at least one."""
    for name, value in values.items():
        if not isinstance(value, Sequence) or not all(map(_is_number, value)):
            raise TypeError(
                f"{_name(owner)}: {name} must be a tuple or list of numbers, got {received(value)}"
            )
        if not value or not all(0 < item < math.inf for item in value):
            raise ValueError(
                f"{_name(owner)}: {name} must hold at least one number, and positive ones, got "
                f"{value!r}"
            )


def group_norm(owner: object, num_groups: Any, num_channels: Any, eps: Any) -> None:
    """The sizes of a group norm."""
    integers(owner, 1, num_groups=num_groups, num_channels=num_channels)
    numbers(owner, 0, eps=eps)
    if num_channels % num_groups:
        raise ValueError(
            f"{_name(owner)}: {num_channels} channels cannot be divided into {num_groups} groups; "
            f"num_groups must be a divisor of {num_channels}"
        )


def received(value: object) -> str:
    """A value and its type, shortened."""
    return f"{reprlib.repr(value)} ({type(value).__name__})"


def _name(owner: object) -> str:
    return owner if isinstance(owner, str) else type(owner).__name__


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _require_number(owner: object, name: str, value: object) -> None:
    if not _is_number(value):
        raise TypeError(f"{_name(owner)}: {name} must be a number, got {received(value)}")
