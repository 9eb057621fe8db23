"""The teacher's part of a run, for rank 0: pairs become candidates, in one of two orders.

    before     with `preselect_share` only the rows that are worth it, say those that the student finds hardest
    all        new instructions, then new responses to originals and new instructions            3 calls a row
    selective  new instructions; the student chooses; new responses to what it chose only        2 calls a row

Both give the same winners for the same replies: who wins the duel of instructions (V2 Eq. 6) does not depend on the
responses that are made afterwards. Tables on disk carry the work from step to step, so a killed run goes on from the
last one.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from .arguments import DataArguments, TeacherArguments
from .columns import KEY_COLUMNS, SCORE_COLUMNS, is_usable
from .errors import SettingsError
from .launch import revision_of
from .reflection import ReflectionTransform
from .run import Run, content_digest, is_complete
from .selection import RULES, kept_positions, select_top
from .teacher import Teacher

if TYPE_CHECKING:
    from trl import SFTTrainer

    from .callback import SelectionCallback
    from .published import Published

_ANSWERED = {"response": "original", "instruction+response": "instruction"}  # what each was written to


def check_selective(rule: str, candidates: str | None) -> None:
    """Raise a SettingsError where `reflect: selective` cannot work."""
    if candidates is not None:
        raise SettingsError(
            f"With `candidates: {candidates}` nothing is asked, so there is no order of asking: leave out "
            "`reflect: selective`, or `candidates`."
        )
    if RULES[rule].among_all is not None:
        raise SettingsError(
            f"The rule {rule!r} compares all versions of a row at once, so none can be left out before the responses "
            "are rewritten: it needs `reflect: all`."
        )
    if other := [name for name in RULES[rule].needs if name not in SCORE_COLUMNS]:
        raise SettingsError(
            f"The rule {rule!r} needs the column {other[0]!r}, which nobody adds between the two reflections. Use "
            "`reflect: all` and `stage: recycle`, add it, and select from that table by `candidates`."
        )


def made_for(student: dict[str, Any], rule: str, seed: int) -> dict[str, Any]:
    """What candidates of `reflect: selective` depend on beside data and teacher: the student and how it chooses."""
    return {"order": "selective", **student, "rule": rule, **({"seed": seed} if rule == "random" else {})}


def prepare_pairs(run: Run, data: DataArguments, student: dict[str, Any]) -> int:
    """With `preselect_share` by a score: the dataset as pairs/; how many of its rows wait to be scored.

    Scores that are there, by the same student, stay.
    """
    if not data.preselects_by_score:
        return 0
    pairs, source = data.pairs()
    settings = {"dataset": data.dataset, "split": data.split, "content": content_digest(pairs), **student}
    if not run.holds("pairs", pairs=settings):
        if (later := [name for name in ("instructions", "candidates") if run.has(name)]) and not run.overwrite:
            raise SettingsError(
                f"{run.folder / later[0]} holds the results of another run, without `preselect_share`.\nName another "
                "`output_dir`, or replace them with `--overwrite true`: replies stay in the ledger."
            )
        run.save("pairs", pairs)
    run.notes["source"] = source
    return len(unscored(run.load("pairs")))


def pairs_to_estimate(data: DataArguments) -> Dataset:
    """What will be recycled; where the student has yet to preselect it, as many rows at random.

    Raises:
        SettingsError: there are candidates, so nothing will be asked.
    """
    if data.candidates or data.published:
        raise SettingsError("With `candidates` or `published` nothing is asked: there is nothing to estimate.")
    pairs, _ = data.pairs()
    return pairs if data.preselect_share is None else select_top(pairs, share=data.preselect_share, by="random")


def take_published(run: Run, published: "Published") -> None:
    """The authors' candidates as this run's own; says whether their scores choose as many rows as they published."""
    from .published import load_checked

    made_with = {"data": {"dataset": published.texts, "scores": published.scores}, "teacher": {}}
    if not run.holds("candidates", **made_with):
        table, words = load_checked(published)
        print(f"The published scores: {words}.", flush=True)
        run.save("candidates", table)


def take_candidates(run: Run, name: str, candidates: Dataset, content: str) -> None:
    """Another's table, with this content, as what this run's own copy will be made from."""
    run.holds("candidates", data={"dataset": name, "content": content}, teacher={}, reflect=None)
    if revision := revision_of(candidates):
        run.notes["candidates_revision"] = revision


def reflect_all(run: Run, data: DataArguments, asked: TeacherArguments, teacher: Teacher) -> None:
    """`reflect: all`. Pairs → candidates, unless the folder holds them and none still waits for the teacher."""
    table = _pairs(run, data, asked, teacher, None)
    if table is None:
        return
    for transform in asked.reflections(teacher):
        table = _reflected(run, table, transform)
    _save(run, "candidates", table)


def reflect_instructions(
    run: Run, data: DataArguments, asked: TeacherArguments, teacher: Teacher, made_for: dict[str, Any]
) -> int:
    """`reflect: selective`, before the student's choice. Pairs → instructions/; how many versions wait to be scored.

    Versions that were scored before, and have not changed since, keep their scores. None waits for a rule that needs
    no scores.
    """
    table = _pairs(run, data, asked, teacher, made_for)
    if table is None:
        return 0
    table = _reflected(run, table, asked.reflections(teacher)[0])
    if run.has("instructions"):
        table = put_scores(table, run.load("instructions"))
    _save(run, "instructions", table)
    scores_matter = bool(RULES[made_for["rule"]].needs)
    return len(unscored(run.load("instructions"))) if scores_matter else 0


def unscored(instructions: Dataset) -> Dataset:
    """All versions of the rows in which a usable version has no scores yet."""
    texts = zip(instructions["instruction"][:], instructions["response"][:], strict=True)
    waiting = {
        row_id
        for row_id, text, scores in zip(instructions["row_id"], texts, _scores(instructions), strict=True)
        if is_usable(*text) and all(score is None for score in scores.values())
    }
    return instructions.select([n for n, row_id in enumerate(instructions["row_id"]) if row_id in waiting])


def score(run: Run, table: str, build: Callable[[], "SFTTrainer"], rule: str, template: str, seed: int) -> None:
    """The student scores a table of the run before the teacher is asked; all ranks call.

    `build` makes a trainer over `unscored(run.load(table))`. Afterwards nothing of it is left: no memory is held while
    the teacher is asked for hours, and random states are as before, so that a new adapter begins as in a launch that
    only trains.

    Args:
        run: whose table gets the scores.
        table: "pairs", or "instructions".
        build: makes the trainer, anew.
        rule: by which versions are chosen, for the table that is shown.
        template: as in training.
        seed: of the rule "random".
    """
    import torch

    from .callback import SelectionCallback
    from .launch import release

    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        trainer = build()
        # nothing is dropped: filter and gates are for the winners of both stages
        callback = SelectionCallback(
            trainer, rule=rule, ifd_gate=None, r_ifd_gate=None, keep=None, seed=seed, template=template
        )
        callback.choose()
    run.first(f"{table}_scores", partial(_keep_scores, run, table, callback))
    del callback
    release(trainer)


def _keep_scores(run: Run, name: str, callback: "SelectionCallback") -> None:
    table = run.load(name)
    scored = put_scores(table, callback.with_scores(unscored(table)))
    run.save(name, scored, costs={"scoring": {"seconds": callback.seconds}})


def reflect_chosen(run: Run, asked: TeacherArguments, teacher: Teacher, rule: str, seed: int) -> None:
    """`reflect: selective`, after the student's choice. instructions/ → candidates, new responses to the chosen."""
    if run.summary["calls"]["table_reused"]:
        return
    table = run.load("instructions")
    chosen = kept_positions(table, rule, ifd_gate=None, r_ifd_gate=None, keep=None, seed=seed)
    others = np.setdiff1d(np.arange(len(table)), chosen)
    answered = _reflected(run, table.select(chosen), asked.reflections(teacher)[1])
    # a new response stands below what it answers, as in `all`
    place = np.concatenate([others, np.repeat(chosen, 2)])
    both = concatenate_datasets([table.select(others), answered])
    _save(run, "candidates", both.select(np.argsort(place, kind="stable")))


def chosen_branches(candidates: Dataset) -> Dataset:
    """Of each row the version that the student chose to have answered anew, and the new response to it.

    Which one that was the table itself says: it is the one with a row for a new response, usable or not.
    """
    versions = list(zip(candidates["row_id"], candidates["variant"], strict=True))
    answered = {(row_id, _ANSWERED[variant]) for row_id, variant in versions if variant in _ANSWERED}
    return candidates.select([n for n, each in enumerate(versions) if each in answered or each[1] in _ANSWERED])


def put_scores(table: Dataset, scored: Dataset) -> Dataset:
    """The table with the scores of these versions, where the texts are the same; its others keep theirs."""
    from .scoring import replace_scores

    new = dict(zip(_versions(scored), _scores(scored), strict=True))
    rows = [new.get(version, own) for version, own in zip(_versions(table), _scores(table), strict=True)]
    return replace_scores(table, {name: [row[name] for row in rows] for name in SCORE_COLUMNS})


def _pairs(
    run: Run, data: DataArguments, asked: TeacherArguments, teacher: Teacher, made_for: dict[str, Any] | None
) -> Dataset | None:
    """What is to be recycled; None where the folder holds what came of it, and none of that waits for the teacher."""
    pairs = _worth_it(run, data)
    share, by = {"preselect_share": data.preselect_share}, {"preselect_by": data.preselect_by}
    preselected = {} if data.preselect_share is None else share | by
    settings = {
        "data": {"dataset": data.dataset, "split": data.split, **preselected, "content": content_digest(pairs)},
        "teacher": asked.settings(teacher),
        "reflect": made_for,
    }
    reused = run.holds("candidates", **settings) and is_complete(run.load("candidates"))
    if made_for and not reused:
        run.holds("instructions", **settings)
    run.notes["api_key_env"] = asked.api_key_env
    run.note(calls={"asked": 0, "reused": 0, "failed": 0, "cost": 0.0, "table_reused": reused})
    return None if reused else pairs


def _worth_it(run: Run, data: DataArguments) -> Dataset:
    """The rows that the teacher is to rewrite."""
    if data.preselects_by_score:
        pairs, source = run.load("pairs"), run.notes["source"]
    else:
        pairs, source = data.pairs()
    run.notes["source"] = source
    if data.preselect_share is None:
        return pairs
    top = select_top(pairs, share=data.preselect_share, by=data.preselect_by)
    run.notes["source"] = source | {"not_preselected": len(pairs) - len(top)}
    print(f"Of {len(pairs):,} rows {len(top):,} are recycled, the first by {data.preselect_by}.", flush=True)
    return top.remove_columns([name for name in SCORE_COLUMNS if name in top.column_names])


def _reflected(run: Run, table: Dataset, transform: ReflectionTransform) -> Dataset:
    """Ask in one stream, then replay; counted in the summary."""
    calls = run.summary["calls"]
    for name, number in transform.prefetch(table).items():
        calls[name] = calls.get(name, 0) + number
    run.notes.setdefault("costs", {})[transform.part] = dict(transform.took)
    run.notes["teacher_replies"] = dict(Counter(run.notes.get("teacher_replies")) + transform.returned)
    run.notes["teacher_models"] = list(run.notes["teacher_replies"])
    return table.map(transform, batched=True, load_from_cache_file=False, desc=f"Reflecting: {transform.part}")


def _save(run: Run, name: str, table: Dataset) -> None:
    """Save, unless just these versions are there: their scores, and what was made from them, stay."""
    if not run.has(name) or content_digest(run.load(name)) != content_digest(table):
        run.save(name, table, **(run.notes if name == "candidates" else {}))


def _versions(table: Dataset) -> Iterator[tuple]:
    return zip(*(table[name][:] for name in (*KEY_COLUMNS, "instruction", "input", "response")), strict=True)


def _scores(table: Dataset) -> Iterator[dict[str, float | None]]:
    columns = [table[name][:] if name in table.column_names else [None] * len(table) for name in SCORE_COLUMNS]
    return (dict(zip(SCORE_COLUMNS, row, strict=True)) for row in zip(*columns, strict=True))
