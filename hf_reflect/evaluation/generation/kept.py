"""Answers that a kill cannot take: part files beside the output, one a process, a line for each answer."""

import glob
import json
import os
from pathlib import Path

from ...errors import DataError


def part_file(output: str | Path, rank: int) -> Path:
    """Where this process keeps its own."""
    return Path(f"{output}.part-{rank}")


def part_files(output: str | Path) -> list[Path]:
    """All there are, whatever number of processes wrote them."""
    return sorted(Path(output).parent.glob(f"{glob.escape(Path(output).name)}.part-*"))


def append(path: Path, answers: dict[str, dict[str, str]]) -> None:
    """Add answers to a part file, behind a line that a kill may have cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        if file.tell() and not path.read_bytes().endswith(b"\n"):
            file.write(b"\n")
        file.writelines(json.dumps(answer).encode() + b"\n" for answer in answers.values())
        file.flush()
        os.fsync(file.fileno())


def finished(output: str | Path) -> dict[str, dict[str, str]]:
    """Answers in the file and its parts, by key."""
    found = {}
    for path in (Path(output), *part_files(output)):
        for line in path.read_bytes().splitlines() if path.exists() else ():
            try:
                row = json.loads(line)
                answer = {name: row[name] for name in ("answer", "finish", "made_with")}
            except (ValueError, KeyError, TypeError) as error:
                if path == Path(output):
                    raise DataError(
                        f"{output} is there, but was not generated here (no `made_with` in each line): it is left as "
                        "it is. Name another `output`."
                    ) from error
                continue  # cut by a kill
            found[answer["made_with"]] = answer
    return found
