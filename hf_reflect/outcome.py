"""What a run leaves to look at: statistics, a report, cards, the dataset on the Hub, figures beside the training's."""

import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import DataArguments
from .errors import ReflectError, SettingsError
from .launch import local_tokenizer
from .run import Run, print_summary

if TYPE_CHECKING:
    from trl import SFTTrainer


def check_push(data: DataArguments) -> None:
    """Before a teacher is paid: raise what a push at the end would raise for want of a login or of a licence."""
    if data.push_dataset_to:
        from .hub.pushing import check_access

        if data.stage == "recycle":
            raise SettingsError(
                "`push_dataset_to` publishes candidates with what was selected from them, and `stage: recycle` "
                "selects nothing: set it for `select`, `train` or `all`, or give `push_recycled` a selection of yours."
            )

        check_access(data.push_dataset_to, data.publication(), private=not data.push_public)


def look_back(run: Run, data: DataArguments) -> None:
    """Rank 0: `statistics.json`, `report.html` where its extra is installed, the summary on the screen, and the push.

    Raises as `push_recycled` does; nothing of the run is lost then.
    """
    from .report import build_report, statistics
    from .report.lengths import remembering

    candidates = run.load("candidates")
    selected = run.load("selected") if run.has("selected") else None
    student = run.settings_of("selected").get("student", {}).get("model")
    tokenizer = remembering(local_tokenizer(run.folder, student))
    statistics(candidates, selected, tokenizer, costs=run.costs()).save(run.folder / "statistics.json")
    if data.report and find_spec("matplotlib"):
        build_report(run.folder, tokenizer=tokenizer)
    print_summary(run.summary, run.folder)
    if data.push_dataset_to and selected is not None:
        _push(run.folder, data.push_dataset_to, data.publication(), not data.push_public, tokenizer)


def _push(folder: Path, name: str, publication: dict[str, str], private: bool, tokenizer: Any) -> None:
    from .hub import push_run

    try:
        print(f"  published  {push_run(folder, name, publication, private, tokenizer=tokenizer)}\n", flush=True)
    except ReflectError as error:
        more = [] if private else ["--public"]
        more += [word for key, value in publication.items() for word in (f"--{key}", value)]
        again = shlex.join(["python", "-m", "hf_reflect.hub", "push", str(folder), name, *more])
        raise type(error)(f"{error}\nThe run is complete, and only this push is missing: `{again}`.") from error


def figures(run: Run, selection: dict[str, Any], told: bool) -> dict[str, float]:
    """What is known before the training, for `report_to`: the teacher's cost; and the choice, unless that is told.

    Args:
        run: with its candidates and selected rows.
        selection: the settings of the choice.
        told: whether a `SelectionCallback` tells of the choice.
    """
    from .callback.numbers import numbers_of
    from .recycling import chosen_branches
    from .report.statistics import selected_places
    from .selection import decide

    of_teacher = [numbers for stage, numbers in run.costs().items() if stage in ("instruction", "response")]
    found = {f"teacher/{name}": sum(some[name] for some in of_teacher) for name in (of_teacher or [{}])[0]}
    if not told:
        candidates, settings = run.load("candidates"), run.settings_of("candidates")
        playing = chosen_branches(candidates) if settings.get("reflect") else candidates
        rules = {name: selection[name] for name in ("rule", "ifd_gate", "r_ifd_gate", "keep", "seed")}
        originals = [place for place, variant in enumerate(playing["variant"]) if variant == "original"]
        kept = selected_places(playing, run.load("selected"))
        numbers = numbers_of(playing, decide(playing, **rules), originals, kept)
        found |= {f"selection/{name}": number for name, number in numbers.items()}
    return found


def name_origin(trainer: "SFTTrainer", run: Run, data: DataArguments, base_model: str) -> None:
    """Have every model card that the trainer writes name dataset, base model, recipe and rule."""
    create = trainer.create_model_card

    def create_and_add(*args: Any, **kwargs: Any) -> None:
        create(*args, **kwargs)
        if run.is_first:
            from .hub import provenance_of
            from .hub.card import write_model_card

            given = sys.argv[sys.argv.index("--config") + 1] if "--config" in sys.argv[:-1] else sys.argv[0]
            dataset = data.push_dataset_to or data.candidates or data.dataset
            folder = Path(trainer.args.output_dir or ".")
            write_model_card(folder, provenance_of(run.folder), base_model, dataset, Path(given).name)

    trainer.create_model_card = create_and_add
