"""Selective Reflection-Tuning in one launch: recycle the data with a teacher, let the student choose, fine-tune it.

    accelerate launch recipes/srecycle_wizardlm.py                       # runs srecycle_wizardlm.yaml, beside it
    accelerate launch recipes/srecycle_wizardlm.py --config my.yaml --estimate_only true

Every argument: `--help`, or hf_reflect/arguments.py. What is written where: README. Source: arXiv 2402.10110.
"""

from datasets import Dataset

from hf_reflect import SelectionCallback, Teacher, demo, to_pairs, to_training_ids
from hf_reflect.arguments import DataArguments, SelectionArguments, TeacherArguments, parse_arguments
from hf_reflect.columns import require_columns
from hf_reflect.errors import SettingsError
from hf_reflect.launch import load_table, load_tokenizer, main_of
from hf_reflect.reflection import estimate_recycling
from hf_reflect.run import (
    Run,
    content_digest,
    describe_candidates,
    describe_selected,
    describe_training,
    is_complete,
    print_estimate,
    weights_digest,
)


def load_pairs(data: DataArguments) -> Dataset:
    if data.dataset is None:
        raise SettingsError("Name the data to recycle: `dataset: <folder, file or Hub id>`, or `--dataset ...`.")
    dataset = load_table(data.dataset, data.split)
    names = data.rename_columns or {}
    require_columns(dataset.column_names, names, "`rename_columns`", "Give the names as they are: old to new.")
    dataset = dataset.rename_columns(names)
    dataset = dataset.take(min(data.max_rows or len(dataset), len(dataset)))
    return to_pairs(dataset, turns=data.turns, invalid=data.invalid)


def recycle(run: Run, data: DataArguments, asked: TeacherArguments, teacher: Teacher) -> None:
    """Pairs → candidates, unless the folder holds them and none of them still waits for the teacher."""
    table = load_pairs(data)
    source = {"dataset": data.dataset, "split": data.split, "content": content_digest(table)}
    made = run.load("candidates") if run.holds("candidates", data=source, teacher=asked.settings(teacher)) else None
    calls = {"asked": 0, "reused": 0, "failed": 0, "cost": 0.0, "table_reused": made is not None and is_complete(made)}
    run.note(calls=calls)
    if calls["table_reused"]:
        return
    for transform in asked.reflections(teacher):
        for name, number in transform.prefetch(table).items():
            calls[name] = calls.get(name, 0) + number
        table = table.map(transform, batched=True, load_from_cache_file=False, desc=f"Reflecting: {transform.part}")
    if made is None or content_digest(made) != content_digest(table):
        run.save("candidates", table)


def main() -> None:
    from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config, get_quantization_config

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
    if data.estimate_only:
        first, then = asked.reflections(teacher)
        run.first("estimate", lambda: print_estimate(estimate_recycling(first, then, load_pairs(data))))
        return run.close()

    # 1. The teacher rewrites: rank 0 asks, the others wait for the table. What can be wrong later is looked at before.
    recycling = data.stage == "recycle" or (data.stage == "all" and data.candidates is None)
    if recycling:
        run.first("ready", teacher.check_ready)
    if data.stage != "recycle":
        tokenizer = load_tokenizer(model.model_name_or_path, model.model_revision, training.trust_remote_code)
    if recycling:
        run.first("candidates", lambda: recycle(run, data, asked, teacher))
    if data.stage == "recycle":
        run.note(candidates=describe_candidates(run.load("candidates")))
        return run.finish()

    # 2. The student chooses among all versions, inside the trainer that will train on them.
    candidates = load_table(data.candidates, what="candidates") if data.candidates else run.load("candidates")
    run.note(candidates=describe_candidates(candidates))
    student = {"model": model.model_name_or_path, "revision": model.model_revision, "dtype": model.dtype}
    student |= {"template": chosen_by.template, "max_length": training.max_length, "bf16": training.bf16}
    student |= {"load_in_4bit": model.load_in_4bit, "load_in_8bit": model.load_in_8bit}
    selection = {"rule": chosen_by.rule, "keep": chosen_by.keep, "seed": training.seed}
    selection |= {"ifd_gate": chosen_by.ifd_gate, "r_ifd_gate": chosen_by.r_ifd_gate}

    def is_chosen() -> bool:
        student["weights"] = weights_digest(model.model_name_or_path)
        selection["candidates"] = content_digest(candidates)
        if data.candidates:  # another run's: a copy with scores comes here, unless this folder has its own
            run.holds("candidates", data={"dataset": data.candidates, "content": selection["candidates"]}, teacher={})
        return run.holds("selected", student=student, selection=selection)

    reuse = run.first("is_chosen", is_chosen)
    if data.stage == "train" and not reuse:
        raise SettingsError(
            f"`stage: train` needs {run.folder / 'selected'}: run `stage: select` with these settings first."
        )

    def training_rows() -> Dataset:
        if reuse:
            return run.load("selected")
        return to_training_ids(candidates, tokenizer, chosen_by.template, training.max_length)

    training.output_dir = str(run.folder / "model")
    trainer = SFTTrainer(
        model=model.model_name_or_path,
        args=training,
        train_dataset=run.training_rows(training_rows),
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )
    if not reuse:
        callback = SelectionCallback(trainer, **vars(chosen_by), seed=training.seed)
        trainer.add_callback(callback)
        selected = callback.choose()

        def save_choice() -> None:
            run.save("candidates", callback.with_scores(candidates))
            run.save("selected", selected)

        run.first("selected", save_choice)

    # 3. The student learns what it chose.
    if data.stage != "select":
        trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
        trainer.save_model()
        trainer.save_state()
        run.note(training=describe_training(trainer))
    if run.is_first:
        selected = run.load("selected")
        run.note(selected=describe_selected(selected, rows_cut=None if reuse else callback.rows_cut))
        if data.push_dataset_to:
            selected.remove_columns(["input_ids", "labels"]).push_to_hub(data.push_dataset_to, private=True)
    run.finish()


if __name__ == "__main__":
    main_of(main)
