"""What lies in a run's folder, piece by piece; what is not there, or has an odd form, is empty."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..errors import DataError, ReflectError, SettingsError
from ..files import read_object
from ..selection import DEFAULTS, check_settings

T = TypeVar("T")


@dataclass
class Record:
    """What was written down of a run, as far as it has the form that a run writes."""

    data: dict[str, Any]
    teacher: dict[str, Any]
    student: dict[str, Any]
    reflect: dict[str, Any]
    selection: dict[str, Any]  # `select`'s settings
    choosable: bool  # whether `select` would take them
    source: dict[str, float]
    costs: dict[str, dict[str, float]]  # of each stage
    calls: dict[str, float]  # of a summary of before costs were noted
    history: list[dict[str, Any]]  # what the Trainer logged: each with its step
    spent: dict[str, float] | None  # of the ledger
    notes: list[str]  # for the reader of the page


def read_record(run_dir: Path) -> Record:
    """Summary, settings, log and ledger. What has another form than a run writes is left out, and a note says so.

    Raises:
        DataError: a summary.json or made_with.json is no JSON object.
    """
    odd: list[str] = []
    summary = read_object(run_dir / "summary.json", absent={})
    made_with = {
        name: read_object(run_dir / name / "made_with.json", absent={}) for name in ("selected", "candidates")
    }
    settings = _piece(summary, "settings", dict, "summary.json", odd)

    def section(name: str, table: str) -> dict[str, Any]:
        here = _piece(settings, name, dict, "summary.json", odd)
        return here or _piece(made_with[table], name, dict, f"{table}/made_with.json", odd)

    def figures(name: str) -> dict[str, Any]:
        here = _piece(summary, name, dict, "summary.json", odd)
        return here or _piece(made_with["candidates"], name, dict, "candidates/made_with.json", odd)

    costs = figures("costs")
    source, calls = figures("source"), _piece(summary, "calls", dict, "summary.json", odd)
    selection, problem = _selection(section("selection", "selected"))
    record = Record(
        data=_piece(settings, "data", dict, "summary.json", odd),
        teacher=_piece(settings, "teacher", dict, "summary.json", odd),
        student=_piece(settings, "student", dict, "summary.json", odd),
        reflect=section("reflect", "candidates"),
        selection=selection,
        choosable=not problem,
        source=_numbers(source, "source", odd),
        costs={stage: _numbers(_piece(costs, stage, dict, "costs", odd), f"costs of {stage}", odd) for stage in costs},
        calls=_numbers(calls, "calls", odd),
        history=_history(run_dir, odd),
        spent=_spent(run_dir / "ledger.sqlite"),
        notes=[note] if (note := _piece(summary, "note", str, "summary.json", odd)) else [],
    )
    if problem:
        record.notes.append(f"The settings of the choice cannot be used, so they are not applied: {problem}")
    if odd:
        some = f"{', '.join(odd[:5])}{', …' * (len(odd) > 5)}"
        record.notes.append(f"Left out, since it does not have the form that a run writes: {some}.")
    return record


def is_number(value: Any) -> bool:
    """Whether it is a finite number, and one that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _piece(holder: Mapping[str, Any], name: str, kind: type[T], where: str, odd: list[str]) -> T:
    """What stands under this name, if it is of this kind; else an empty one, and `odd` has its name."""
    found = holder.get(name)
    if isinstance(found, kind):
        return found
    if found is not None:
        odd.append(f"{name} in {where}")
    return kind()


def _numbers(holder: Mapping[str, Any], where: str, odd: list[str]) -> dict[str, float]:
    """What is a number; a yes or no beside them is none, but not odd."""
    known = {name: value for name, value in holder.items() if value is not None and not isinstance(value, bool)}
    odd += [f"{name} in {where}" for name, value in known.items() if not is_number(value)]
    return {name: value for name, value in known.items() if is_number(value)}


def _selection(given: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The settings of the choice, and why they cannot be used; gates that are no numbers are none then."""
    found: dict[str, Any] = {name: given.get(name, default) for name, default in DEFAULTS.items()}
    found["rule"] = str(found["rule"])
    try:
        check_settings(**found)
    except SettingsError as error:
        gates = {name: found[name] if is_number(found[name]) else None for name in ("ifd_gate", "r_ifd_gate")}
        return found | gates, str(error)
    return found, ""


def _history(run_dir: Path, odd: list[str]) -> list[dict[str, Any]]:
    for place in ("model/trainer_state.json", "trainer_state.json"):
        try:
            state = read_object(run_dir / place, absent={})
        except DataError:
            odd.append(place)
            continue
        if entries := _piece(state, "log_history", list, place, odd):
            found = [entry for entry in entries if isinstance(entry, dict) and is_number(entry.get("step"))]
            # what closes a log may have no step
            if any(not isinstance(entry, dict) or not is_number(entry.get("step", 0)) for entry in entries):
                odd.append(f"entries of log_history in {place}")
            return found
    return []


def _spent(path: Path) -> dict[str, float] | None:
    """What the ledger says; a ledger that is in use, or damaged, must not cost anybody the report."""
    if not path.is_file():
        return None
    from ..ledger import Ledger

    try:
        with Ledger(path) as ledger:
            return ledger.spent()
    except (ReflectError, OSError):
        return None
