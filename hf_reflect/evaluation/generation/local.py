"""Answers from a model's weights, on any number of processes."""

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset, Features, Value

from ...errors import SettingsError
from ..answers import ANSWER_FEATURES, answer_to, write_answers
from ..questions import question_rows
from .kept import append, finished, part_file, part_files

if TYPE_CHECKING:
    import torch

    from ...scoring.student import Student

_DEFAULT_LENGTH = 2048  # where a model does not say for how many tokens it is made
_GENERATED = Features({**ANSWER_FEATURES, "finish": Value("string"), "made_with": Value("string")})


@dataclass
class _Prompt:
    """One question as the model sees it."""

    ids: list[int]
    room: int  # for the answer, in tokens
    temperature: float  # 0: greedy
    key: str  # a digest of all that its answer depends on
    cut: bool  # to fit


def generate_answers(
    model: Any,
    tokenizer: Any,
    questions: Dataset,
    template: str = "auto",
    max_new_tokens: int = 1024,
    max_length: int | None = None,
    batch_size: int = 8,
    do_sample: bool = False,
    temperature: float = 1.0,
    seed: int = 0,
    output: str | Path | None = None,
    name: str | None = None,
    replace: bool = True,
) -> Dataset:
    """A local model's answers, for whoever compares models; the same table on every process of a launch.

    In:  question_id, question, optionally category, test_set, history (earlier turns: role and content),
         temperature (of this question; 0 or null: greedy)                                                 (N rows)
    Out: question_id, question, category, test_set, answer, model, finish ("stop" or "length"), made_with  (N rows)

    The model is shown the very prompt ids of training, and stops at the tokenizer's EOS, whatever its
    `generation_config` says. Of several processes each holds the whole model and takes a share of the batches, which
    are sorted by length and padded on the left. A sampled answer depends on its seed and its question alone, not on
    the batch; in half precision rounding may still turn a near tie.

    With `output`, answers are kept in part files beside it as soon as their batch is done: after a kill the same call
    goes on, on any number of processes. `made_with` tells whether an answer is one of this model, prompt and sampling;
    others are generated anew.

    Args:
        model: a causal language model, whole, on the device where it is to run.
        tokenizer: its tokenizer.
        questions: the table.
        template: as in training: see `hf_reflect.templates`.
        max_new_tokens: of an answer, at most.
        max_length: of prompt and answer together; what the model is made for unless given. A prompt gives way as in
            training, so that a quarter stays for the answer.
        batch_size: questions in a batch: smaller where memory does not suffice.
        do_sample: False: greedy, unless a question's own temperature says otherwise.
        temperature: with `do_sample`; the whole vocabulary is sampled from.
        seed: of sampling.
        output: file of answers (JSONL), in the order of the questions; appears at the end, whole.
        name: of the model, for the column `model`; where it was loaded from unless given.
        replace: whether answers of other settings in `output` may go.

    Raises:
        DataError: columns are missing, a question is null or stands there twice, a history is none; `output` was not
            written here.
        SettingsError: numbers out of range; no causal language model, or one in parts; see `StudentTemplate`.
    """
    from ...scoring.processes import Processes
    from ...scoring.student import Student

    numbers = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "max_length": max_length}
    for key, value in numbers.items():
        if (type(value) is not int or value < 1) and not (key == "max_length" and value is None):
            raise SettingsError(f"`{key}` is a whole number, at least 1, not {value!r}.")
    if do_sample and not temperature > 0:
        raise SettingsError(f"`do_sample` needs a temperature above 0, not {temperature!r}; leave it out for greedy.")
    student, processes = Student(model), Processes()
    if student.is_sharded:
        raise SettingsError("The model lies in parts on several processes: load it whole on each, or serve it.")
    length = max_length or getattr(student.config, "max_position_embeddings", None) or _DEFAULT_LENGTH
    rows = question_rows(questions, "`generate_answers`")
    for row in rows:
        row["temperature"] = row.get("temperature", temperature if do_sample else 0.0) or 0.0
    prompts = _prompts(student, tokenizer, rows, template, length, max_new_tokens, seed)

    # All have looked for what is there before anyone adds to it, else they would share out different questions.
    found = processes.gather(finished(output) if output else {})
    done = {key: answer for some in found for key, answer in some.items()}
    missing = {prompt.key: prompt for prompt in prompts if prompt.key not in done}
    if processes.rank == 0:
        _say_beforehand(output, done, prompts, replace)
    batches = _batches(missing.values(), batch_size)[processes.rank :: processes.count]
    own: dict[str, dict[str, str]] = {}
    with student.ready(), _own_generation_config(student.model), _bar(processes.rank, batches) as bar:
        for batch in batches:
            answers = _generate(student, tokenizer, batch)
            own |= answers
            if output:
                append(part_file(output, processes.rank), answers)
            bar.update(len(batch))
    for answers in (shares := processes.gather(own)):
        done |= answers
    if processes.rank == 0 and missing:
        each = f", {' + '.join(str(len(share)) for share in shares)} on {len(shares)} processes"
        made = f"{len(missing)} answer{'s' * (len(missing) > 1)}"
        print(f"Generated {made}{each if len(shares) > 1 else ''}.", file=sys.stderr, flush=True)

    if processes.rank == 0 and (empty := sum(not done[prompt.key]["answer"] for prompt in prompts)):
        print(f"{empty} of {len(prompts)} answers are empty: is `template` that of the training?", file=sys.stderr)
    name = name or getattr(model, "name_or_path", "") or type(model).__name__
    table = [answer_to(row, model=name, **done[prompt.key]) for row, prompt in zip(rows, prompts, strict=True)]
    if output:
        if processes.rank == 0:
            write_answers(output, table)
        processes.gather(None)  # the file is there before the parts go
        for path in part_files(output):
            path.unlink(missing_ok=True)
    return Dataset.from_list(table, features=_GENERATED)


def _prompts(
    student: "Student", tokenizer: Any, rows: list[dict[str, Any]], template: str, length: int, most: int, seed: int
) -> list[_Prompt]:
    from ...scoring import StudentScorer
    from ...templates import StudentTemplate

    # what an answer depends on is what a score depends on; of the length only what it leaves of prompt and answer
    settings = StudentScorer(student.model, tokenizer, template).__getstate__()
    settings = {key: value for key, value in settings.items() if key not in ("max_length", "coherence")}
    shown = StudentTemplate(tokenizer, template, length - min(most, max(length // 4, 1)) + 1)
    prompts = []
    for row in rows:
        ids, _, cut = shown.forward({"instruction": row["question"], "input": "", "response": "", **row})
        room = min(most, length - len(ids))
        draw: Any = [row["temperature"], seed, row["question_id"]] if row["temperature"] else "greedy"
        told = json.dumps([settings, ids, room, draw], sort_keys=True)
        prompts.append(_Prompt(ids, room, row["temperature"], hashlib.sha256(told.encode()).hexdigest()[:32], cut))
    return prompts


def _batches(prompts: Iterable[_Prompt], size: int) -> list[list[_Prompt]]:
    """The longest first, so that memory ends at once or never; those with the same room together."""
    batches: list[list[_Prompt]] = []
    for prompt in sorted(prompts, key=lambda prompt: (-len(prompt.ids), prompt.key)):
        if not batches or len(batches[-1]) == size or batches[-1][0].room != prompt.room:
            batches.append([])
        batches[-1].append(prompt)
    return batches


def _generate(student: "Student", tokenizer: Any, batch: list[_Prompt]) -> dict[str, dict[str, str]]:
    """Answers by key."""
    import torch
    from transformers import GenerationConfig, LogitsProcessorList

    eos, longest = tokenizer.eos_token_id, len(batch[0].ids)
    ids = torch.full((len(batch), longest), eos)  # (questions, tokens)
    seen = torch.zeros_like(ids)
    for row, prompt in enumerate(batch):
        ids[row, longest - len(prompt.ids) :] = torch.tensor(prompt.ids)
        seen[row, longest - len(prompt.ids) :] = 1
    made = student.model.generate(
        input_ids=ids.to(student.device),
        attention_mask=seen.to(student.device),
        generation_config=GenerationConfig(
            max_new_tokens=batch[0].room, do_sample=False, eos_token_id=eos, pad_token_id=eos
        ),
        logits_processor=LogitsProcessorList([_draws(batch)]),
    )
    answers = {}
    for prompt, new in zip(batch, made[:, longest:].tolist(), strict=True):
        stops = eos in new
        text = tokenizer.decode(
            new[: new.index(eos)] if stops else new, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        answers[prompt.key] = {
            "answer": text.strip(),
            "finish": "stop" if stops else "length",
            "made_with": prompt.key,
        }
    return answers


def _draws(batch: list[_Prompt]) -> Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]:
    """Noise that makes the likeliest token a draw (Gumbel's), from a generator for each question.

    So a question's answer is drawn alike in any batch, on any process, before and after a kill.
    """
    import torch

    generators: dict[int, torch.Generator] = {}

    def draw(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # (questions, vocabulary)
        for row, prompt in enumerate(batch):
            if prompt.temperature:
                if row not in generators:
                    generators[row] = torch.Generator(scores.device).manual_seed(int(prompt.key[:15], 16))
                noise = torch.rand(scores.shape[1], generator=generators[row], device=scores.device)
                scores[row] = scores[row] / prompt.temperature - (-noise.log()).log()
        return scores

    return draw


@contextmanager
def _own_generation_config(model: Any) -> Iterator[None]:
    """Without what a model's folder says of sampling, penalties and ends, which `generate` would mix in."""
    from transformers import GenerationConfig

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = [(holder, holder.generation_config) for holder in (model, base)]
    try:
        for holder, _ in before:
            holder.generation_config = GenerationConfig()
        yield
    finally:
        for holder, config in before:
            holder.generation_config = config


def _say_beforehand(output: str | Path | None, done: dict[str, Any], prompts: list[_Prompt], replace: bool) -> None:
    words = []
    if kept := sum(prompt.key in done for prompt in prompts):
        words.append(f"{output}: {kept} of {len(prompts)} answers are there and kept.")
    if others := len(done.keys() - {prompt.key for prompt in prompts}):
        found = f"{others} answer{'s' * (others > 1)}"
        if not replace:
            raise SettingsError(
                f"{output} holds {found} of other settings (model, template, sampling, lengths) or to other "
                "questions.\nName another `output`, or replace them with `--overwrite true`."
            )
        words.append(
            f"{output}: {found} of other settings (model, template, sampling, lengths) or to other questions "
            "will be replaced."
        )
    if cut := sum(prompt.cut for prompt in prompts):
        words.append(f"{cut} of {len(prompts)} prompts were cut to leave room for the answer.")
    if words:
        print("\n".join(words), file=sys.stderr, flush=True)


def _bar(rank: int, batches: list[list[_Prompt]]) -> Any:
    from tqdm import tqdm

    shown = rank == 0 and sys.stderr.isatty()
    return tqdm(
        total=sum(map(len, batches)), desc="Generating", unit=" answers", dynamic_ncols=True, disable=not shown
    )
