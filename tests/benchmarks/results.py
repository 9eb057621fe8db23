"""What the benchmarks share: a line of a table, and a section of RESULTS.md for each of them."""

import datetime
import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

RESULTS = Path(__file__).with_name("RESULTS.md")


class Row(NamedTuple):
    """One line of the table; without a mark a figure is for information."""

    what: str
    figure: str
    mark: str = ""
    reached: bool = True


def verdict(row: Row) -> str:
    return ("reached" if row.reached else "MISSED") if row.mark else ""


def shown(rows: Iterable[Row]) -> list[Row]:
    """The rows, each printed as it comes."""
    found = []
    for row in rows:
        print(f"{row.what}\n    {row.figure}   {row.mark}   {verdict(row)}", flush=True)
        found.append(row)
    return found


def report(title: str, found: list[Row], packages: Iterable[str], how: str, machine: str = "") -> str:
    """The table in Markdown, and what it was measured on: of the packages those that are installed."""
    with open("/proc/cpuinfo") as file:
        cpu = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), "?")
    system = f"{platform.system()} {platform.release().split('-')[0]}"
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    installed = {each.metadata["Name"]: each.version for each in importlib.metadata.distributions()}
    versions = ", ".join(f"{name} {installed[name]}" for name in packages if name in installed)
    arguments = " ".join("PATH" if "/" in word else word for word in sys.argv[1:])
    command = f"python tests/benchmarks/{Path(sys.argv[0]).name} {arguments}".strip()
    lines = [f"| {row.what} | {row.figure} | {row.mark} | {verdict(row)} |" for row in found]
    head = f"""# {title}

By `{command}` on {datetime.date.today()}, {how}.
Machine: {cpu}, {os.cpu_count()} cores, {ram:.0f} GiB{machine}; {system}.
Python {platform.python_version()}; {versions}.

| what | figure | must reach | |
|---|---|---|---|
"""
    return head + "\n".join(lines) + "\n"


def write(section: str, path: Path = RESULTS) -> None:
    """Put a section in the place of the one with its title, or at the end; the other benchmarks' stay."""
    text = path.read_text() if path.exists() else ""
    sections = re.findall(r"^# .*\n(?:(?!# ).*\n)*", text, re.MULTILINE)
    title = section.splitlines()[0]
    place = next((n for n, old in enumerate(sections) if old.splitlines()[0] == title), len(sections))
    sections[place : place + 1] = [section]
    path.write_text("\n".join(old.rstrip() + "\n" for old in sections))
