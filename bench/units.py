"""Durations and byte counts as people write and read them."""

import re

from .errors import UsageError

MIB = 2**20

_SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_LONGEST_S = 366 * 24 * 3600.0
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h)")


def parse_duration_s(text: str) -> float:
    """Seconds in a duration such as '500ms', '90s', '8m' or '1.5h'."""
    match = _DURATION.fullmatch(text.strip())
    seconds = float(match[1]) * _SECONDS[match[2]] if match else 0.0
    if not 0 < seconds <= _LONGEST_S:
        raise UsageError(
            f"{text!r} is not a duration: write a positive number and its unit, "
            "ms, s, m or h, such as 90s or 8m, at most a year"
        )
    return seconds


_BYTES = {"B": 1, "KiB": 2**10, "MiB": MIB, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMG]?i?B)")


def parse_bytes(text: str) -> int:
    """Bytes in a size such as '24GiB', '512 MiB' or '80GB'."""
    match = _SIZE.fullmatch(text.strip())
    count = float(match[1]) * _BYTES.get(match[2], 0) if match else 0
    if not 1 <= count < 2**62:
        raise UsageError(
            f"{text!r} is not a size: write a positive number and its unit, {', '.join(_BYTES)}, "
            "such as 24GiB, less than 4 EiB"
        )
    return int(count)


def format_duration(seconds: float) -> str:
    """'0.4s', '12s', '3m05s' or '2h07m'."""
    if seconds < 10:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def format_mib(count_bytes: int) -> str:
    """Mebibytes (2^20 bytes) with three significant digits and no unit, as a table column wants."""
    mib = count_bytes / MIB
    return f"{mib:,.0f}" if mib >= 100 else f"{mib:.1f}" if mib >= 10 else f"{mib:.2f}"


def format_bytes(count_bytes: int) -> str:
    """A byte count in the largest binary unit that leaves at least one."""
    value = float(count_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:,.1f} EiB"


def format_ratio(ratio: float) -> str:
    """Two decimals; of a ratio near zero its first two digits, since 0.00 would say nothing."""
    return f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.2g}"


def counted(count: int, noun: str) -> str:
    """'1 cell' or '2 cells'."""
    return f"{count} {noun}" if count == 1 else f"{count:,} {noun}s"
