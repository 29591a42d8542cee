"""What the benchmarks share: parsing options, choosing transports, recording the conditions of a result."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from antiphon.comm import parse_transport
from antiphon.config.resolve import resolve_device
from antiphon.core.errors import OptionError, unknown_value
from antiphon.core.sizes import parse_size

_RANGE_STEP = 4


def check_ranks(ranks: int) -> None:
    """Raises `OptionError` for fewer than two: one rank has nothing to exchange."""
    if ranks < 2:
        raise OptionError(f"--ranks {ranks} has no communication to measure", remedy="use at least 2", option="ranks")


def resolve_measured_device(device: str, ranks: int, kinds: Sequence[str]) -> str:
    """The kind of device to measure on. kinds: those for which the benchmarks have sizes.

    Raises `OptionError` for other kinds: figures of generic:cuda would be mistaken for CUDA's.
    """
    kind, _ = resolve_device(device, ranks)
    if kind not in kinds:
        raise OptionError(
            f"benchmarks do not run on device={kind!r}",
            limit=f"they run on {' and '.join(kinds)}",
            remedy=f"use one of {', '.join(kinds)}",
            option="device",
            value=kind,
        )
    return kind


_NOT_BY_DEFAULT = ("local", "one-sided", "simulated")


def resolve_transports(text: str | None, *, device: str, ranks: int, peer_access: bool) -> list[str]:
    """The requested transports, or all that this machine can use. Raises `OptionError` for an unknown name."""
    if text is None:
        return _usable(device, ranks, peer_access)
    names = parse_names(text, "transports")
    for name in names:
        parse_transport(name)
    return names


def _usable(device: str, ranks: int, peer_access: bool) -> list[str]:
    """The transports that `antiphon doctor` reports as usable, except those for tests.

    Without one-sided, which is copy-engine wherever two lanes run or steps are large.
    """
    from antiphon.comm import usable_transports
    from antiphon.machine.probe import examine_machine  # takes seconds

    judged = usable_transports(examine_machine(), ranks=ranks, device_kind=device, peer_access=peer_access)
    names = [found.name for found in judged if found.usable and found.name not in _NOT_BY_DEFAULT]
    if "copy-engine" in names:
        names.insert(names.index("copy-engine"), "nccl-zero-cta")  # a baseline with the same requirements
    if not names:
        why = "; ".join(f"{found.name}: {found.reason}" for found in judged)
        raise OptionError(
            f"no transport is usable for --ranks {ranks} on {device}",
            limit=why,
            remedy="run antiphon doctor for details",
        )
    return names


def parse_names(text: str, option: str, valid: Sequence[str] | None = None) -> list[str]:
    """Distinct names separated by commas. Raises `OptionError` for none, a repeated one, or one not in `valid`."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or len(set(names)) < len(names):
        raise OptionError(
            f"--{option} {text!r} is not a list of distinct names",
            remedy="separate them with commas",
            option=option,
        )
    for name in names:
        if valid is not None and name not in valid:
            raise unknown_value(option, name, valid)
    return names


def parse_counts(text: str, option: str) -> list[int]:
    """Integers of at least 1, separated by commas. Raises `OptionError` for anything else."""
    counts = [parse_size(name, f"--{option}") for name in parse_names(text, option)]
    if min(counts) < 1:
        raise OptionError(
            f"--{option} {text!r} is not a list of counts",
            limit="each must be at least 1",
            remedy="write integers such as 512,2k",
            option=option,
            value=text,
        )
    return counts


def parse_numbers(text: str, option: str) -> list[float]:
    """Numbers separated by commas. Raises `OptionError` for anything else."""
    try:
        return [float(name) for name in parse_names(text, option)]
    except ValueError as error:
        raise OptionError(
            f"--{option} {text!r} is not a list of numbers", remedy="write numbers such as 50,99.9", option=option
        ) from error


def parse_sizes(text: str, option: str = "sizes") -> list[int]:
    """Bytes from `4K,1M`, or from a range `4K..512M` in steps of 4x, including its end. Raises `OptionError`."""
    sizes: list[int] = []
    for name in parse_names(text, option):
        first, dots, last = name.partition("..")
        size, end = _size(first, option), _size(last if dots else first, option)
        if end < size:
            raise OptionError(
                f"--{option} {name} has its larger size first", remedy="write the smaller size first", option=option
            )
        while size < end:
            sizes.append(size)
            size *= _RANGE_STEP
        sizes.append(end)
    return sizes


def _size(text: str, option: str) -> int:
    size = parse_size(text, f"--{option}", of_bytes=True)
    if size < 1:
        raise OptionError(
            f"--{option} {text!r} is not a size", remedy="write bytes, or a size such as 4K, 16M, 1G", option=option
        )
    return size


def conditions(results: Sequence[dict[str, Any]], options: dict[str, Any]) -> dict[str, Any]:
    """The part of a result that says where, when and how it was measured. results: one per rank."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "devices": [result["device"] for result in results],
        "versions": results[0]["versions"],
        "options": options,
    }


def check_writable(path: Path | None, option: str) -> None:
    """Create the folder and try to open the file, before anything is measured. The file is left as it was.

    Raises `OptionError` if it cannot be written.
    """
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_fifo():
            return  # opening and closing a pipe would end its stream
        is_new = not path.exists()
        path.open("ab").close()
        if is_new:
            path.resolve().unlink()  # the target of a link, not the link
    except OSError as error:
        raise OptionError(
            f"--{option} {path} cannot be written", limit=str(error), remedy="name another file", option=option
        ) from error


def write_json(result: dict[str, Any], path: Path | None) -> None:
    """Print the result as the last line, and write it indented to `path`. Floats are rounded to 6 digits."""
    result = _rounded(result)
    try:
        print(json.dumps(result, allow_nan=False), flush=True)
    finally:  # if one of the two fails, the other is still written
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value
