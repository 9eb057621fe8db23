"""How a student sees a pair, token by token: the same ids are scored and trained on; and the formats out.

    one training sequence          | prompt ids (BOS where the tokenizer adds one) | target ids | EOS |
    scored, given the instruction  | prompt ids                                    | target ids |
    scored alone                   | BOS, or EOS where there is no BOS             | target ids |

The target is tokenised once, by itself, so that a tokenizer cannot merge across the border
and the ids agree everywhere.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from .columns import is_usable, question, require_columns
from .errors import DataError, SettingsError

if TYPE_CHECKING:  # scoring needs templates, and runs where `datasets` is not installed
    from datasets import Dataset, Features

REVERSE_QUESTION = (
    "Below is the response to an instruction, please guess the corresponding instruction for the given response.\n"
    "{y}\nGenerate the instruction for the above response."
)


@dataclass(frozen=True)
class _TextTemplate:
    """The prompt of a turn is `before + text + after`; `system` stands once, before the first."""

    before: str
    after: str
    system: str = ""

    def opening(self, turns: list[dict[str, str]]) -> tuple[str, list[dict[str, str]]]:
        """What stands before the first turn, the row's own system message if it has one; and the turns without it."""
        if turns and turns[0]["role"] == "system":
            return turns[0]["content"] + (" " if self.system else "\n\n"), turns[1:]
        return self.system, turns


_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)
TEMPLATES = {
    "vicuna": _TextTemplate(
        "USER: ",
        " ASSISTANT:",
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. ",
    ),
    "alpaca": _TextTemplate(_ALPACA + "### Instruction:\n", "\n\n### Response:"),
    "wizardlm": _TextTemplate("", "\n\n### Response:"),
    "plain": _TextTemplate("", "\n"),
}
TEMPLATE_NAMES = ("auto", "chat", *TEMPLATES)


def check_template(template: str) -> None:
    """Raise a SettingsError unless there is such a template."""
    if template not in TEMPLATE_NAMES:
        raise SettingsError(f"`template={template!r}` is unknown; there are {', '.join(TEMPLATE_NAMES)}.")


class Encoded(NamedTuple):
    """A context and its target, as ids that fit; `cut` says whether something had to give way."""

    context: list[int]
    target: list[int]
    cut: bool


class StudentTemplate:
    """A named template together with a tokenizer: text in, ids that fit `max_length` out.

    Args:
        tokenizer: the student's.
        template: "auto" (the tokenizer's chat template, else vicuna), "chat", "vicuna", "alpaca", "wizardlm", "plain".
        max_length: tokens of one training sequence; one place is kept for EOS.

    Raises:
        SettingsError: an unknown template, "chat" without a chat template, a tokenizer without EOS, a `max_length`
            that is no number of tokens.
    """

    def __init__(self, tokenizer: Any, template: str = "auto", max_length: int = 2048):
        check_template(template)
        has_chat = bool(getattr(tokenizer, "chat_template", None))
        if template == "chat" and not has_chat:
            raise SettingsError("`template='chat'` needs a tokenizer with a chat template; name a template instead.")
        if tokenizer.eos_token_id is None:
            raise SettingsError("The student's tokenizer has no EOS token: set one, `tokenizer.eos_token = ...`.")
        if not isinstance(max_length, int) or isinstance(max_length, bool) or max_length < 2:
            raise SettingsError(f"`max_length` is a number of tokens, not {max_length!r}.")
        self.tokenizer, self.max_length = tokenizer, max_length
        self.name = ("chat" if has_chat else "vicuna") if template == "auto" else template
        self.eos: int = tokenizer.eos_token_id
        bos = tokenizer.bos_token_id
        self.alone: list[int] = [self.eos if bos is None else bos]

    @property
    def texts(self) -> list[str]:
        """What stands around a pair's texts, a tokenizer's chat template excepted."""
        return [REVERSE_QUESTION, str(TEMPLATES.get(self.name, ""))]

    def forward(self, row: dict[str, Any]) -> Encoded:
        """The response y after its instruction x (and the turns before)."""
        return self._encoded(*_forward(row))

    def reverse(self, row: dict[str, Any]) -> Encoded:
        """The instruction x after the question that guesses it from y."""
        return self._encoded(*_reverse(row))

    def encode(self, rows: list[dict[str, Any]]) -> list[tuple[Encoded, Encoded]]:
        """`forward` and `reverse` of many rows.

        Texts are tokenised together, which costs a fraction of as many single calls.
        """
        asked = [way(row) for row in rows for way in (_forward, _reverse)]
        at_once = [
            self._written(prompt)[1] if self.name == "chat" or not prompt.turns else None for prompt, _ in asked
        ]
        targets = self._together({target for _, target in asked}, special=False)
        contexts = self._together({text for text in at_once if text is not None}, special=self.name != "chat")
        encoded = [
            self._fit(prompt, targets[target], self._context(prompt) if text is None else contexts[text])
            for (prompt, target), text in zip(asked, at_once, strict=True)
        ]
        return list(zip(encoded[::2], encoded[1::2], strict=True))

    def training_ids(self, row: dict[str, Any]) -> dict[str, Any]:
        """input_ids and labels of one pair, -100 on the prompt; `cut` beside them."""
        context, target, cut = self.forward(row)
        ids = [*target, self.eos]
        return {"input_ids": context + ids, "labels": [-100] * len(context) + ids, "cut": cut}

    def _encoded(self, prompt: "_Prompt", target: str) -> Encoded:
        return self._fit(prompt, self.ids(target), self._context(prompt))

    def _fit(self, prompt: "_Prompt", target_ids: list[int], context: list[int]) -> Encoded:
        """Context and target within max_length - 1 tokens.

        The context gives way first, until the target has min(its length, max_length // 2) tokens: the oldest turns
        whole, then the end of the prompt's text. Then the target's tail is cut.
        """
        room = self.max_length - 1
        if len(context) + len(target_ids) <= room:
            return Encoded(context, target_ids, False)
        budget = room - min(len(target_ids), self.max_length // 2)  # the context's
        turns = prompt.turns
        first = 1 if turns and turns[0]["role"] == "system" else 0
        while len(context) > budget and len(turns) > first:
            del turns[first : first + 2]
            context = self._context(prompt)
        if (excess := len(context) - budget) > 0:
            span = self._text_span(prompt)
            kept = max(len(span) - excess, 0)
            context = context[: span.start + kept] + context[span.stop :]
        if len(context) + bool(target_ids) > room:
            raise SettingsError(
                f"`max_length={self.max_length}` leaves no room: the template {self.name!r} alone takes "
                f"{len(context)} tokens{' with the system message of a row' if first else ''}. "
                "Raise `max_length`, or choose a shorter template."
            )
        return Encoded(context, target_ids[: room - len(context)], True)

    def ids(self, text: str) -> list[int]:
        """The ids of a text by itself, without special tokens."""
        return self._ids(text, special=False)

    def _ids(self, text: str, special: bool) -> list[int]:
        return self._together({text}, special)[text]

    def _together(self, texts: set[str], special: bool) -> dict[str, list[int]]:
        if not texts:
            return {}
        ordered = sorted(texts)
        # not verbose: it would warn of a length that is cut here
        ids = self.tokenizer(ordered, add_special_tokens=special, verbose=False)["input_ids"]
        return {text: self._opened(some, special) for text, some in zip(ordered, ids, strict=True)}

    def _opened(self, ids: list[int], special: bool) -> list[int]:
        """Without the EOS of a tokenizer that also closes what it opens: the answer follows."""
        return ids[:-1] if special and len(ids) > 1 and ids[-1] == self.eos else ids

    def _context(self, prompt: "_Prompt") -> list[int]:
        """The prompt's ids, earlier turns included."""
        before, text = self._written(prompt)
        return before + self._ids(text, special=self.name != "chat" and not before)

    def _text_span(self, prompt: "_Prompt") -> range:
        """Which of the context's ids lie wholly in the prompt's text; none where a slow tokenizer cannot tell."""
        if not self.tokenizer.is_fast:
            return range(0)
        before, text = self._written(prompt)
        without = self._written(prompt._replace(text=_MARK))[1]
        start = without.rindex(_MARK)
        end = len(text) - (len(without) - start - len(_MARK))
        special = self.name != "chat" and not before
        encoding = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
        kept = len(self._opened(encoding["input_ids"], special))
        offsets = encoding["offset_mapping"][:kept]
        inside = [i for i, (left, right) in enumerate(offsets, len(before)) if start <= left < right <= end]
        return range(inside[0], inside[-1] + 1) if inside else range(0)

    def _written(self, prompt: "_Prompt") -> tuple[list[int], str]:
        """The ids of earlier turns, and the last turn as text."""
        turns = prompt.turns
        content = prompt.before + prompt.text + prompt.after
        if self.name == "chat":
            return [], self._rendered([*turns, {"role": "user", "content": content}])
        template = TEMPLATES[self.name]
        system, turns = template.opening(turns)
        before: list[int] = []
        for user, assistant in zip(turns[::2], turns[1::2], strict=True):
            text = ("" if before else system) + template.before + user["content"] + template.after
            before += self._ids(text, special=not before) + self.ids(assistant["content"]) + [self.eos]
        return before, ("" if before else system) + template.before + content + template.after

    def _rendered(self, messages: list[dict[str, str]]) -> str:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except TemplateError as error:
            raise SettingsError(
                f"The tokenizer's chat template refuses the roles {[turn['role'] for turn in messages]}: {error}. "
                "Leave such turns out of the data, or name another template (`template='vicuna'`)."
            ) from error


# Stands in for the text to find where a chat template puts it; a private-use character that no data should hold.
_MARK = "\ue000"


class _Prompt(NamedTuple):
    """What a student is shown before the target: earlier turns, then a text with something around it."""

    turns: list[dict[str, str]]
    before: str
    text: str
    after: str


def _forward(row: dict[str, Any]) -> tuple[_Prompt, str]:
    x = question(row["instruction"], row["input"])
    return _Prompt(list(row.get("history") or []), "", x, ""), row["response"]


def _reverse(row: dict[str, Any]) -> tuple[_Prompt, str]:
    before, after = REVERSE_QUESTION.split("{y}")
    x = question(row["instruction"], row["input"])
    return _Prompt(list(row.get("history") or []), before, row["response"], after), x


def to_training_ids(dataset: "Dataset", tokenizer: Any, template: str = "auto", max_length: int = 2048) -> "Dataset":
    """Add `input_ids` and `labels` to the usable rows of a table, for SFTTrainer, which takes them as they are.

    In:  instruction, input, response, optionally history; unusable rows are left out           (N rows)
    Out: all columns, input_ids and labels (-100 on the prompt), prompt + response + EOS, at most max_length (≤ N rows)

    These are the ids that `StudentScorer` scores, with the same template and length. SFTTrainer's own tokenisation of
    prompt and completion together gives other first tokens with many tokenizers.

    Raises:
        DataError: columns are missing, no row is usable.
        SettingsError: see `StudentTemplate`; `max_length` has no room for the template.
    """
    from datasets import Features, List, Value

    student = StudentTemplate(tokenizer, template, max_length)
    rows = usable_rows(dataset, "`to_training_ids`")

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        encoded = student.training_ids(row)
        return {"input_ids": encoded["input_ids"], "labels": encoded["labels"]}

    features = Features({**rows.features, "input_ids": List(Value("int32")), "labels": List(Value("int32"))})
    return rows.map(encode, features=features, load_from_cache_file=False, desc="Tokenizing pairs")


def to_messages(dataset: "Dataset", keep_texts: bool = False) -> "Dataset":
    """Replace the text columns of the usable rows by `messages`, whole conversations: free of any template.

    In:  instruction, input, response, optionally history; unusable rows are left out           (N rows)
    Out: messages (role, content), and the other columns                                       (≤ N rows)

    Args:
        dataset: the table.
        keep_texts: leave the text columns beside the new one: `SelectionCallback` scores them.
    """
    from datasets import Features, List

    from .pairs import TURN

    rows = usable_rows(dataset, "`to_messages`", new=("messages",))

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        user = {"role": "user", "content": question(row["instruction"], row["input"])}
        return {"messages": [*(row.get("history") or []), user, {"role": "assistant", "content": row["response"]}]}

    return _converted(rows, convert, Features({"messages": List(TURN)}), keep_texts)


def to_prompt_completion(dataset: "Dataset", template: str = "vicuna", keep_texts: bool = False) -> "Dataset":
    """Replace the text columns of the usable rows by `prompt` and `completion`, for other people's pipelines.

    In:  instruction, input, response, optionally history; unusable rows are left out           (N rows)
    Out: prompt, completion (text), and the other columns                                      (≤ N rows)

    Earlier turns are written out with `</s>` behind each answer. For training with SFTTrainer use `to_training_ids`.

    Args:
        dataset: the table.
        template: "vicuna", "alpaca", "wizardlm" or "plain"; a chat template needs a tokenizer: use `to_messages`.
        keep_texts: leave the text columns beside the new ones: `SelectionCallback` scores them.
    """
    if template not in TEMPLATES:
        raise SettingsError(
            f"`to_prompt_completion(template={template!r})` needs one of {', '.join(TEMPLATES)}; for chat templates "
            "use `to_messages`."
        )
    from datasets import Features, Value

    rows = usable_rows(dataset, "`to_prompt_completion`", new=("prompt", "completion"))
    shape = TEMPLATES[template]

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        prompt, turns = shape.opening(row.get("history") or [])
        for user, assistant in zip(turns[::2], turns[1::2], strict=True):
            prompt += f"{shape.before}{user['content']}{shape.after}{assistant['content']}</s>"
        prompt += shape.before + question(row["instruction"], row["input"]) + shape.after
        return {"prompt": prompt, "completion": row["response"]}

    new = Features({"prompt": Value("string"), "completion": Value("string")})
    return _converted(rows, convert, new, keep_texts)


def usable_rows(dataset: "Dataset", who: str, new: tuple[str, ...] = ()) -> "Dataset":
    """The rows with instruction and response. DataError where there is none, or a column is in the way."""
    require_columns(dataset.column_names, ("instruction", "input", "response"), who)
    if there := [name for name in new if name in dataset.column_names]:
        raise DataError(f"{who} writes the column {there[0]!r}, which is there already: rename or remove it before.")
    pairs = zip(dataset["instruction"], dataset["response"], strict=True)
    keep = [index for index, (instruction, response) in enumerate(pairs) if is_usable(instruction, response)]
    if not keep:
        raise DataError(
            f"{who} found no usable row among {len(dataset)}: `instruction` or `response` is null in each."
        )
    return dataset if len(keep) == len(dataset) else dataset.select(keep)


def _converted(
    rows: "Dataset", convert: Callable[[dict[str, Any]], dict[str, Any]], new: "Features", keep_texts: bool
) -> "Dataset":
    from datasets import Features

    texts = [] if keep_texts else ["instruction", "input", "response", "history"]
    gone = [name for name in texts if name in rows.column_names]
    features = Features({**new, **{name: kind for name, kind in rows.features.items() if name not in gone}})
    return rows.map(convert, remove_columns=gone, features=features, load_from_cache_file=False)
