"""Which training set is best, and how sure is that: a student learns each, all answer, a judge compares the answers.

    accelerate launch --config_file accelerate_configs/zero3.yaml recipes/ablation.py            # runs ablation.yaml
    accelerate launch recipes/ablation.py --config recipes/fewer_data.yaml --estimate_only true

One table of candidates with scores (of srecycle_wizardlm.py, `stage: select`) becomes the training sets of the paper's
Table 4 and two controls; each trains the same number of steps, with several seeds. Every argument: `--help`. A run
that was stopped goes on with what is missing. Source: arXiv 2402.10110, section 4.4.
"""

import json
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from shutil import rmtree
from typing import Any

import datasets
from datasets import Dataset
from transformers import set_seed
from trl import ModelConfig, SFTConfig

from hf_reflect import judge_pairs, to_training_ids
from hf_reflect.arguments import EndpointArguments, mapping, parse_arguments
from hf_reflect.errors import SettingsError
from hf_reflect.evaluation import comparison, experiment
from hf_reflect.evaluation.answers import matched, read_answers, write_answers
from hf_reflect.evaluation.generation import generate_answers, load_student
from hf_reflect.evaluation.questions import load_test_sets
from hf_reflect.files import write_whole
from hf_reflect.judge import check_judges, require_asked
from hf_reflect.launch import build_trainer, load_table, load_tokenizer, main_of, release
from hf_reflect.run import Run, content_digest, cost_of, describe_student, describe_training, tokens_of
from hf_reflect.templates import check_template


@dataclass(kw_only=True)
class AblationArguments:
    """What is compared, on which questions, by whom."""

    candidates: str = field(metadata={"help": "A scored table: folder, file or Hub id."})
    test_sets: dict | str | None = field(
        default=None, metadata={"help": "Test set to file, or null for the Hub: {wizardlm: x.jsonl}."}
    )
    sets: dict | str | None = field(
        default=None,
        metadata={
            "help": "Name to rule, ifd_gate, r_ifd_gate, keep, then share or count and by, or like (as many rows as "
            "another set, at random); the paper's Table 4 and two controls if absent."
        },
    )
    reference: str = field(default="paper", metadata={"help": "The set that the others are judged against."})
    seeds: int = field(default=3, metadata={"help": "Trainings of each set; one says nothing about other trainings."})
    equal_steps: bool = field(
        default=True,
        metadata={"help": "All sets train as long as the reference; false: num_train_epochs over their own rows."},
    )
    judges: list[str] = field(default_factory=list, metadata={"help": "Model names; none: only train and answer."})
    ifd_gate: float | None = field(default=1.0, metadata={"help": "Of rules with gates; null: no gate."})
    r_ifd_gate: float | None = field(default=1.0, metadata={"help": "Likewise."})
    template: str = field(default="vicuna", metadata={"help": "auto, chat, vicuna, alpaca, wizardlm or plain."})
    coherence_model: str | None = field(
        default=None, metadata={"help": "Sentence-BERT, if the table lacks coherence."}
    )
    max_questions: int | None = field(default=None, metadata={"help": "Only the first of them: for a trial."})
    max_new_tokens: int = field(default=1024, metadata={"help": "Of an answer, at most."})
    answer_batch_size: int = field(default=8, metadata={"help": "Questions at once on each process."})
    keep_models: bool = field(default=False, metadata={"help": "Keep what was trained, for other evaluations."})
    estimate_only: bool = field(default=False, metadata={"help": "Print what it takes and can tell, and stop."})
    overwrite: bool = field(default=False, metadata={"help": "Replace what other settings made."})

    def __post_init__(self) -> None:
        self.test_sets = mapping("test_sets", self.test_sets)
        if not self.test_sets:
            raise SettingsError("Name what is asked: `test_sets: {wizardlm: WizardLM_testset.jsonl}`.")
        self.judges = [self.judges] if isinstance(self.judges, str) else self.judges
        self.sets = mapping("sets", self.sets) or experiment.TABLE_4
        experiment.check_sets(self.sets, self.reference)
        check_template(self.template)
        for name in ("seeds", "max_new_tokens", "answer_batch_size", "max_questions"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise SettingsError(f"`{name}` is a whole number, at least 1, not {value!r}.")


def main() -> None:
    types = (AblationArguments, EndpointArguments, SFTConfig, ModelConfig)
    asked, endpoint, training, model = parse_arguments(types, __file__)
    run = Run(training.output_dir, asked.overwrite)
    if (run.folder / "selected").exists():
        raise SettingsError(f"{run.folder} is the folder of a recycling run: name another `output_dir`.")
    judges = {name: endpoint.asking(name, run.folder / "ledger.sqlite") for name in asked.judges}
    seeds = [training.seed + number for number in range(asked.seeds)]
    others = [name for name in asked.sets if name != asked.reference]

    # 1. What is compared, what it takes, and what it can tell: before any money is spent.
    questions = load_test_sets(asked.test_sets)
    questions = questions.take(min(asked.max_questions or len(questions), len(questions)))
    candidates = load_table(asked.candidates, what="candidates", config="candidates")
    unknown = experiment.by_coherence(asked.sets) if "coherence" not in candidates.column_names else []
    if unknown and asked.coherence_model and not asked.estimate_only:
        run.first("coherence", lambda: add_coherence(run, asked, candidates))
        candidates, unknown = run.load("candidates"), []
    if unknown and not asked.estimate_only:
        raise SettingsError(
            f"The table has no column `coherence`, which {', '.join(unknown)} compares: set `coherence_model`, say to "
            "sentence-transformers/all-MiniLM-L6-v2, or leave it out of `sets`."
        )
    known = {name: each for name, each in asked.sets.items() if name not in unknown}
    gates = {"ifd_gate": asked.ifd_gate, "r_ifd_gate": asked.r_ifd_gate}
    sets = {seed: experiment.training_sets(candidates, known, **gates, seed=seed) for seed in seeds}
    steps = {
        name: experiment.steps_of(
            len(sets[seeds[0]][asked.reference if asked.equal_steps and asked.reference in known else name]),
            training,
            run.state.num_processes,
        )
        for name in known
    }
    if run.is_first:
        rows = {name: [len(sets[seed][name]) for seed in seeds] for name in known}
        asking = experiment.judging_takes(
            judges.values(), questions["question"][:], sets, asked.reference, len(others), asked.max_new_tokens
        )
        print(plan(rows, steps, len(questions), len(seeds), len(others), list(judges), asking), flush=True)
        if unknown:
            print(f"Not in these numbers, since their rows are known with the coherence: {', '.join(unknown)}.\n")
    if asked.estimate_only:
        return run.close()
    asks = {"max_new_tokens": asked.max_new_tokens, "questions": experiment.digest_of(questions)}
    contents = run.first("contents", lambda: contents_of(candidates))
    made_with = {"reference": asked.reference, "sets": asked.sets, "seeds": seeds, **gates, **asks, **contents}
    result = run.folder / "ablation.json"
    run.first("is_this", lambda: experiment.is_done(result, made_with, asked.overwrite))
    run.first("judges", lambda: check_judges(judges.values(), questions["question"][0]))

    # 2. Each set trains its student, which answers the questions.
    tokenizer = load_tokenizer(model.model_name_or_path, model.model_revision, training.trust_remote_code)
    student = run.first("student", lambda: describe_student(model, training, asked.template))

    def answers_of(name: str, seed: int) -> Path:
        return run.folder / "answers" / f"{name}-{seed}.jsonl"

    def train(this: str, seed: int, rows: Dataset, folder: Path, made_with: dict[str, Any]) -> dict[str, Any]:
        """The set's student in `folder`, unless it is there; how its training went."""
        result = folder / "training.json"
        if not run.first(f"trained_{this}", lambda: experiment.is_done(result, made_with, asked.overwrite)):
            run.first(f"begun_{this}", lambda: remove(folder))  # what other settings left there
            if run.is_first:
                print(f"\n{this}: {len(rows):,} rows, {made_with['steps']} steps", flush=True)
            arguments = copy(training)
            arguments.output_dir, arguments.seed, arguments.max_steps = str(folder), seed, made_with["steps"]
            set_seed(seed)  # an adapter's first weights too
            ids = run.training_rows(
                lambda: to_training_ids(rows, tokenizer, asked.template, training.max_length), this
            )
            trainer = build_trainer(model, tokenizer, ids, arguments)
            trainer.train()
            trainer.save_model()
            happened = describe_training(trainer)
            release(trainer)
            run.first(f"kept_{this}", lambda: experiment.put(result, happened, settings=made_with))
            run.first(f"rows_gone_{this}", lambda: remove(run.work / this))
        return run.first(f"training_{this}", lambda: json.loads(result.read_text()))

    def train_and_answer(name: str, seed: int, rows: Dataset) -> None:
        this, answers = f"{name}-{seed}", answers_of(name, seed)
        made_with = {
            "set": run.first(f"set_{this}", lambda: experiment.describe_set(rows)),
            "student": student,
            "steps": steps[name],
            "processes": run.state.num_processes,
            **experiment.describe_arguments(training, model),
        }
        folder = run.folder / "models" / this
        done = run.first(f"done_{this}", lambda: experiment.is_done(answers, made_with | asks, asked.overwrite))
        if not done:
            answer(this, seed, rows, folder, answers, made_with)
        if not asked.keep_models:
            run.first(f"gone_{this}", lambda: remove(folder))

    def answer(this: str, seed: int, rows: Dataset, folder: Path, answers: Path, made_with: dict[str, Any]) -> None:
        happened = train(this, seed, rows, folder, made_with)
        run.first(f"made_{this}", lambda: experiment.put(answers, settings=made_with | asks, training=happened))
        dtype = "bfloat16" if training.bf16 else model.dtype or "auto"
        tuned, words = load_student(str(folder), dtype, training.trust_remote_code)
        generate_answers(
            tuned,
            words,
            questions,
            template=asked.template,
            max_new_tokens=asked.max_new_tokens,
            batch_size=asked.answer_batch_size,
            output=answers,
            name=this,
        )

    for seed in seeds:
        for name, rows in sets[seed].items():
            train_and_answer(name, seed, rows)

    # 3. Every judge compares the reference's answers with those of each other set.
    def judged() -> None:
        datasets.disable_progress_bars()
        answers = {(name, seed): read_answers(answers_of(name, seed)) for name in asked.sets for seed in seeds}
        columns: dict[str, dict[str, Any]] = {}
        for name in asked.sets:
            lengths = [len(text) for seed in seeds for text in answers[name, seed]["answer"]]
            rows, chars = len(sets[seeds[0]][name]), round(sum(lengths) / len(lengths))
            columns[name] = {"rows": rows, **({} if asked.equal_steps else {"steps": steps[name]}), "chars": chars}
        found = {
            "reference": asked.reference,
            "seeds": seeds,
            "sets": columns,
            "trainings": {f"{n}-{k}": experiment.made_with(answers_of(n, k))["training"] for n, k in answers},
            "answers": {f"{n}-{k}": experiment.digest_of(table) for (n, k), table in answers.items()},
            "judges": {},
        }
        earlier = json.loads(result.read_text()) if result.exists() else {}
        if earlier.get("answers") == found["answers"]:
            found["judges"] = earlier["judges"]
        for judge, teacher in judges.items():
            outcomes: dict[str, list[list[str | None]]] = {name: [] for name in others}
            for name in others:
                for seed in seeds:
                    one, other = matched(answers[asked.reference, seed], answers[name, seed])
                    pairs = judge_pairs(one["question"], one["answer"], other["answer"], teacher, one["category"])
                    pairs = pairs.add_column("question_id", one["question_id"][:])
                    write_answers(run.folder / "judged" / f"{judge.replace('/', '_')}-{name}-{seed}.jsonl", pairs)
                    require_asked(pairs, teacher)
                    outcomes[name].append(pairs["outcome"][:])
            found["judges"][judge] = {n: each._asdict() for n, each in comparison.differences(outcomes).items()}
            # after each judge: another may fail
            write_whole(run.folder / "ablation.md", words := in_words(found, len(questions)))
            experiment.put(result, found, settings=made_with)
        print(f"\n{words}\nWritten: {run.folder / 'ablation.md'}, ablation.json, answers/, judged/\n", flush=True)

    if judges and others:
        run.first("judged", judged)
    run.close()


def in_words(found: dict[str, Any], questions: int) -> str:
    """ablation.md: a table and its meaning for each judge."""
    reference, seeds = found["reference"], found["seeds"]
    ours = ", ".join(f"{number:,} {what}" for what, number in found["sets"][reference].items())
    said = [
        f"# Training sets compared with `{reference}`\n",
        f"{questions} questions, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}. `{reference}`: {ours}.",
        "`rate`: (win − lose) / (win + tie + lose) + 1, so 1 is equal. `chars`: mean characters of an answer; long "
        "answers\nwin comparisons by their length.\n",
    ]
    for judge, results in found["judges"].items():
        each = {name: comparison.Difference(**numbers) for name, numbers in results.items()}
        more = {name: {k: f"{v:,}" for k, v in found["sets"][name].items()} for name in each}
        table = comparison.as_table(each, reference, more)
        said.append(f"## Judged by {judge}\n\n{table}\n\n{comparison.in_words(each, reference, len(seeds))}\n")
    return "\n".join(said)


def contents_of(candidates: Dataset) -> dict[str, str]:
    return {"content": content_digest(candidates), "scores": experiment.digest_of_scores(candidates)}


def add_coherence(run: Run, asked: AblationArguments, candidates: Dataset) -> None:
    """The table with coherence, once for all starts of this experiment."""
    made_with = {"dataset": asked.candidates, "coherence": asked.coherence_model, **contents_of(candidates)}
    if not run.holds("candidates", data=made_with):
        run.save("candidates", experiment.with_coherence(candidates, asked.coherence_model, str(run.state.device)))


def remove(*folders: Path) -> None:
    for folder in folders:
        rmtree(folder, ignore_errors=True)


def plan(
    rows: dict[str, list[int]],
    steps: dict[str, int],
    questions: int,
    seeds: int,
    comparisons: int,
    judges: list[str],
    asking: dict[str, float],
) -> str:
    """What the experiment takes, and which differences it could find."""
    counts = [
        [name, " / ".join(f"{count:,}" for count in dict.fromkeys(some)), steps[name]] for name, some in rows.items()
    ]
    lines = [comparison.markdown([["training set", "rows", "steps"], *counts]), ""]
    lines.append(f"  trainings  {len(rows) * seeds}, {seeds} of each set")
    lines.append(f"  answers    {len(rows) * seeds * questions:,}")
    lines.append(f"  judging    {asking['calls']:,} calls at most ({', '.join(judges) or 'no judge'})")
    if comparisons and judges:
        lines.append(f"  tokens     {tokens_of(asking)}")
        lines.append(f"  cost       {cost_of(asking)}")
        best, worst = comparison.detectable(questions, seeds, comparisons)
        reach = f"{best:.2f} to {worst:.2f} from 1" if seeds > 1 else f"{best:.2f} from 1"
        lines.append(f"  can tell   win rates further than {reach}, 80 % of the time; {comparisons} compared")
        if seeds > 1:
            lines.append("             (it depends on how far the seeds agree; more if trainings differ as a whole)")
        else:
            lines.append("             (of these trainings: one seed says nothing about others)")
    return "\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    main_of(main)
