"""Selective Reflection-Tuning in one launch: recycle the data with a teacher, let the student choose, fine-tune it.

    accelerate launch recipes/srecycle_wizardlm.py                       # runs srecycle_wizardlm.yaml, beside it
    accelerate launch recipes/srecycle_wizardlm.py --config my.yaml --estimate_only true

Every argument: `--help`, or hf_reflect/arguments.py. What is written where: README. Source: arXiv 2402.10110.
"""

from copy import copy
from functools import partial
from shutil import rmtree
from typing import Any

from datasets import Dataset

from hf_reflect import SelectionCallback, demo, outcome, recycling, to_training_ids
from hf_reflect.arguments import DataArguments, SelectionArguments, TeacherArguments, parse_arguments
from hf_reflect.callback import Figures
from hf_reflect.errors import SettingsError
from hf_reflect.launch import build_trainer, load_tokenizer, main_of
from hf_reflect.reflection import estimate_recycling
from hf_reflect.run import (
    Run,
    content_digest,
    describe_candidates,
    describe_selected,
    describe_student,
    describe_training,
    print_estimate,
)


def main() -> None:
    from trl import ModelConfig, SFTConfig, SFTTrainer

    types = (DataArguments, TeacherArguments, SelectionArguments, SFTConfig, ModelConfig)
    data, asked, chosen_by, training, model = parse_arguments(types, __file__)
    run = Run(training.output_dir, data.overwrite)
    teacher = asked.teacher(run.folder / "ledger.sqlite")
    if data.candidates == str(run.folder / "candidates"):
        data.candidates = None  # this run's own
    if data.demo:
        run.first("demo", lambda: demo.prepare(teacher, run.folder / "student"))
        data.dataset, model.model_name_or_path = demo.PAIRS, str(run.folder / "student")
        run.note(note=demo.NOTE)
    if selective := data.reflect == "selective":
        recycling.check_selective(chosen_by.rule, data.candidates)
    if data.estimate_only:
        first, then = asked.reflections(teacher)
        pairs = recycling.pairs_to_estimate(data)
        run.first("estimate", lambda: print_estimate(estimate_recycling(first, then, pairs, selective)))
        return run.close()

    run.first("push", lambda: outcome.check_push(data))
    # 1. The teacher rewrites: rank 0 asks, the others wait for the table. What can be wrong later is looked at before.
    asking = data.stage == "recycle" or (data.stage == "all" and not data.candidates and not data.published)
    if asking:
        run.first("ready", teacher.check_ready)
    training.output_dir = str(run.folder / "model")
    student: dict[str, Any] = {}
    if data.stage != "recycle" or selective or data.preselects_by_score:
        tokenizer = load_tokenizer(model.model_name_or_path, model.model_revision, training.trust_remote_code)
        student = run.first("student", lambda: describe_student(model, training, chosen_by.template))
    made_for = recycling.made_for(student, chosen_by.rule, training.seed) if selective else {}

    def ids_of(table: Dataset) -> Dataset:
        return to_training_ids(table, tokenizer, chosen_by.template, training.max_length)

    def trainer_of(rows: Dataset, arguments: SFTConfig) -> SFTTrainer:
        return build_trainer(model, tokenizer, rows, arguments)

    def score(table: str) -> None:  # before the teacher is asked
        arguments = copy(training)
        arguments.output_dir = str(run.work / "scoring")
        rows = run.training_rows(lambda: ids_of(recycling.unscored(run.load(table))), table)
        rule = chosen_by.rule if selective and table == "instructions" else "original"
        recycling.score(run, table, lambda: trainer_of(rows, arguments), rule, chosen_by.template, training.seed)

    if asking and run.first("pairs", lambda: recycling.prepare_pairs(run, data, student)):
        score("pairs")  # which of them are worth it
    if asking and not selective:
        run.first("candidates", lambda: recycling.reflect_all(run, data, asked, teacher))
    elif asking:  # the student chooses between original and new instruction before anything is answered anew
        if run.first("instructions", lambda: recycling.reflect_instructions(run, data, asked, teacher, made_for)):
            score("instructions")
        run.first("candidates", lambda: recycling.reflect_chosen(run, asked, teacher, chosen_by.rule, training.seed))
    elif data.published:
        run.first("candidates", lambda: recycling.take_published(run, data.published_table()))
    if data.stage == "recycle":
        run.note(candidates=describe_candidates(run.load("candidates")))
        return run.finish(partial(outcome.look_back, run, data))

    # 2. The student chooses among all versions, inside the trainer that will train on them.
    candidates = data.candidates_table() if data.candidates else run.load("candidates")
    run.note(candidates=describe_candidates(candidates))
    playing = recycling.chosen_branches(candidates) if selective else candidates
    selection = chosen_by.settings(training.seed)

    def is_chosen() -> bool:
        selection["candidates"] = content = content_digest(candidates)
        if data.candidates:  # another run's: a copy with scores comes here, unless this folder has its own
            recycling.take_candidates(run, data.candidates, candidates, content)
        else:
            run.require("candidates", reflect=made_for)
        return run.holds("selected", student=student, selection=selection)

    reuse = run.first("is_chosen", is_chosen)
    if data.stage == "train" and not reuse:
        raise SettingsError(
            f"`stage: train` needs {run.folder / 'selected'}: run `stage: select` with these settings first."
        )
    choosing = not reuse or chosen_by.schedule == "epoch"
    if reuse and choosing:  # the first choice is that of the scores which were saved with it
        playing = run.load("candidates")
        playing = recycling.chosen_branches(playing) if selective else playing
    trainer = trainer_of(run.training_rows(lambda: ids_of(playing) if choosing else run.load("selected")), training)
    if choosing:
        chosen_by.rescore = chosen_by.rescore and not reuse
        scores = run.folder / "scores" if chosen_by.rescore else None
        callback = SelectionCallback(trainer, **vars(chosen_by), seed=training.seed, checkpoint_dir=scores)
        trainer.add_callback(callback)
        selected = callback.choose()

        def save_choice() -> None:
            scored = callback.with_scores(playing)
            table = recycling.put_scores(candidates, scored) if selective else scored
            run.save("candidates", table, **run.notes)
            run.save("selected", selected, costs={"scoring": {"seconds": callback.seconds}})
            rmtree(run.folder / "scores", ignore_errors=True)

        if not reuse:
            run.first("selected", save_choice)

    # 3. The student learns what it chose.
    if data.stage != "select":
        figures = run.first("figures", lambda: outcome.figures(run, selection, told=choosing))
        trainer.add_callback(Figures(trainer, figures))
        outcome.name_origin(trainer, run, data, model.model_name_or_path)
        trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
        trainer.save_model()
        trainer.save_state()
        trainer.create_model_card(run.folder.name)
        run.note(training=describe_training(trainer))
    run.note(selected=describe_selected(run.load("selected"), rows_cut=None if reuse else callback.rows_cut))
    run.finish(partial(outcome.look_back, run, data))


if __name__ == "__main__":
    main_of(main)
