"""What teacher and judge are asked and what shape a reply has: criteria, template and form side by side.

Texts after arXiv 2402.10110, Figures 4 to 6. Ledger keys hang on them: a changed character asks everything again.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from string import Formatter
from typing import Any

from .errors import SettingsError
from .parsing import Rewrite as Rewrite
from .parsing import is_end_tag, read_json, read_tagged, withheld

INSTRUCTION_CRITERIA = (
    "Complexity of the Topic",
    "Level of Detail Required",
    "Knowledge Required",
    "Ambiguity of the Instruction",
    "Logical Reasoning or Problem-Solving Involved",
)
RESPONSE_CRITERIA = ("Helpfulness", "Relevance", "Accuracy", "Level of Details")

_PAIR = "{history}[Instruction]\n{instruction}\n\n{input}[The Start of Answer]\n{response}\n[The End of Answer]\n\n"
_FIELDS = ("history", "instruction", "input", "response", "instruction_criteria", "response_criteria")
_SAMPLE = Rewrite(
    instruction="Say which rivers of Europe cross the most borders, and why.",
    response="The Danube: it touches ten countries on its way from the Black Forest to the Black Sea.",
    critique="It is thin, and names no country.",
)


@dataclass(frozen=True)
class ReflectionPrompt:
    """How a teacher is asked to rewrite a pair, and how its reply is read.

    The reply is expected to hold one section a tag, `[tag] text [end]`. With two tags these are the new instruction
    and the answer to it, with one the better answer. With a `schema` in place of tags it is a JSON object.

    Args:
        system: the system message.
        user: a `str.format` template with `{instruction}`, `{response}` and, if wanted, `{history}`, `{input}`,
            `{instruction_criteria}`, `{response_criteria}`; history and input bring their own block, or nothing.
        tags: one or two, in the order in which the teacher is to write them.
        instruction_criteria: listed where `{instruction_criteria}` stands.
        response_criteria: listed where `{response_criteria}` stands.
        end: the tag that closes a section; `[End]` and its like stay readable under any other.
        input_block: template around a pair's `{input}`, where it has one.
        history_block: template around the earlier `{turns}`, where there are some.
        example: a reply as the teacher would write it; what `render` makes unless given. It must be readable.
        schema: JSON schema of the reply, an object with the text properties `response`, perhaps `instruction`, and
            `critique`.

    Raises:
        SettingsError: a template has unknown fields or lacks one; tags are missing, too many or alike; or the parser
            cannot read the example.

    Source: arXiv 2402.10110, section 3.1.
    """

    system: str
    user: str
    tags: tuple[str, ...] = ()
    instruction_criteria: tuple[str, ...] = INSTRUCTION_CRITERIA
    response_criteria: tuple[str, ...] = RESPONSE_CRITERIA
    end: str = "End"
    input_block: str = "[The Start of Input]\n{input}\n[The End of Input]\n\n"
    history_block: str = "[The Start of Conversation]\n{turns}\n[The End of Conversation]\n\n"
    example: str | None = None
    schema: dict[str, Any] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        for name in ("tags", "instruction_criteria", "response_criteria"):
            if isinstance(values := getattr(self, name), str):
                raise SettingsError(f"`{name}` is one text, of which each letter would count: give ({values!r},).")
            object.__setattr__(self, name, tuple(values))  # a list would do, but has no hash
        _check_template("user", self.user, _FIELDS, needed=("instruction", "response"))
        _check_template("input_block", self.input_block, ("input",), needed=("input",))
        _check_template("history_block", self.history_block, ("turns",))
        if self.schema is None:
            self._check_tags()
        elif self.tags:
            raise SettingsError("A reply is read by `tags` or as JSON by `schema`: give one of them, not both.")
        elif "response" not in self._properties:
            raise SettingsError(
                f"`schema` has the properties {sorted(self._properties)}, but the rewrite is read from `response` "
                "(and `instruction`, where that is rewritten too). Add it to the schema's `properties`."
            )
        self._check_example()

    def chat(
        self, instruction: str, response: str, input: str = "", history: Iterable[dict[str, str]] = ()
    ) -> list[dict[str, str]]:
        """The messages that ask for a rewrite of this pair."""
        turns = "\n".join([f"{turn['role'].upper()}: {turn['content']}" for turn in history or ()])
        user = _filled(
            self.user,
            history=self.history_block.format(turns=turns) if turns else "",
            instruction=instruction,
            input=self.input_block.format(input=input) if input else "",
            response=response,
            instruction_criteria=_listed(self.instruction_criteria),
            response_criteria=_listed(self.response_criteria),
        )
        return [{"role": "system", "content": self.system}, {"role": "user", "content": user}]

    def parse(self, text: str, finish_reason: str | None = "stop") -> Rewrite:
        """Read a reply to the character, or say why it cannot be used; never raises.

        `error` is one of `truncated: …` (the reply hit its token limit), `refused: …`, `unparsed: …` (a section is
        missing, empty, or cannot be told from others), `placeholder: …` (the prompt's own words came back).
        """
        if error := withheld(finish_reason):
            return Rewrite(error=error)
        if self.schema is not None:
            return read_json(text, self.parts)
        return read_tagged(text, self.tags, self.end, asked=self.user)

    def render(self, rewrite: Rewrite) -> str:
        """A reply as the teacher should write it: the critique, then each section; `parse` reads it back."""
        values = [getattr(rewrite, part) or "" for part in self.parts]
        if self.schema is not None:
            reply = {"critique": rewrite.critique or ""} if "critique" in self._properties else {}
            return json.dumps(reply | dict(zip(self.parts, values, strict=True)), ensure_ascii=False, indent=2)
        sections = [f"[{tag}]\n{value}\n[{self.end}]" for tag, value in zip(self.tags, values, strict=True)]
        return "\n\n".join([rewrite.critique, *sections] if rewrite.critique else sections)

    @property
    def response_format(self) -> dict[str, Any] | None:
        """What an OpenAI-compatible endpoint takes as `response_format` to enforce the schema; None without one."""
        if self.schema is None:
            return None
        closed = {"type": "object", "required": list(self._properties), "additionalProperties": False}
        return {
            "type": "json_schema",
            "json_schema": {"name": "rewrite", "strict": True, "schema": self.schema | closed},
        }

    @property
    def _properties(self) -> dict[str, Any]:
        return (self.schema or {}).get("properties", {})

    @property
    def parts(self) -> tuple[str, ...]:
        """What a reply brings, in order: ("response",), or ("instruction", "response")."""
        both = "instruction" in self._properties if self.schema is not None else len(self.tags) > 1
        return ("instruction", "response") if both else ("response",)

    def _check_tags(self) -> None:
        tags = self.tags
        if len(tags) not in (1, 2):
            raise SettingsError(
                f"`tags` is {tags!r}, but a reply has one section (the better answer) or two (the new instruction, "
                'the answer to it). Give a tuple of one or two tags, such as ("Better Answer",).'
            )
        for name, tag in [*(("tags", tag) for tag in tags), ("end", self.end)]:
            if not tag.strip():
                raise SettingsError(f"`{name}` holds the empty tag {tag!r}, which opens every line. Give it a name.")
        folded = [" ".join(tag.casefold().split()) for tag in tags]
        if len(set(folded)) < len(folded):
            raise SettingsError(
                f"`tags` holds [{tags[0]}] twice, so nobody could tell its sections apart. Rename one."
            )
        for tag, name in zip(tags, folded, strict=True):
            if name == " ".join(self.end.casefold().split()) or is_end_tag(tag):
                raise SettingsError(f"[{tag}] is in `tags`, but closes a section (`end` is {self.end!r}). Rename it.")

    def _check_example(self) -> None:
        rewrite = self.parse(self.example if self.example is not None else self.render(_SAMPLE))
        read = tuple(getattr(rewrite, part) for part in self.parts)
        if rewrite.error is None and (self.example or read == tuple(getattr(_SAMPLE, part) for part in self.parts)):
            return
        form = "a JSON object with " + " and ".join(f"`{part}`" for part in self.parts)
        if self.schema is None:
            form = " ".join(f"[{tag}] … [{self.end}]" for tag in self.tags)
        raise SettingsError(
            f"This prompt cannot read its own example: {rewrite.error or f'it took {read}'}. It reads {form}: write "
            + ("the `example` so, or change `tags` and `end` to what it uses." if self.example else "plainer tags.")
        )


@dataclass(frozen=True)
class JudgePrompt:
    """How a judge is asked to compare two answers; `hf_reflect.judge.read_scores` reads its review.

    Args:
        system: the system message.
        user: a `str.format` template with `{question}`, `{answer_1}` and `{answer_2}`.

    Raises:
        SettingsError: the template has unknown fields or lacks one.

    Source: arXiv 2402.10110, Figure 4.
    """

    system: str
    user: str

    def __post_init__(self) -> None:
        fields = ("question", "answer_1", "answer_2")
        _check_template("user", self.user, fields, needed=fields)

    def chat(self, question: str, answer_1: str, answer_2: str) -> list[dict[str, str]]:
        """The messages that ask for two scores."""
        user = _filled(self.user, question=question, answer_1=answer_1, answer_2=answer_2)
        return [{"role": "system", "content": self.system}, {"role": "user", "content": user}]


@cache
def _pieces(template: str) -> list[tuple[str, str]] | None:
    """Each text of a `str.format` template and the field behind it; None where a field is formatted further."""
    pieces = list(Formatter().parse(template))
    if any(spec or conversion for _, _, spec, conversion in pieces):
        return None
    return [(text, field or "") for text, field, _, _ in pieces]


def _filled(template: str, **values: str) -> str:
    """`template.format(**values)`, at a third of the cost."""
    if (pieces := _pieces(template)) is None:
        return template.format(**values)
    return "".join([part for text, field in pieces for part in (text, values.get(field, ""))])


def _check_template(name: str, template: str, known: tuple[str, ...], needed: tuple[str, ...] = ()) -> None:
    fields = ", ".join(f"{{{field}}}" for field in known)
    try:
        used = {part for _, part, _, _ in Formatter().parse(template) if part is not None}
        unknown = sorted(used - set(known))
        if not unknown:
            template.format(**dict.fromkeys(known, ""))
    except (ValueError, LookupError, AttributeError) as error:
        raise SettingsError(
            f"`{name}` is no template that `str.format` takes: {error}. Double the braces that stand for themselves "
            f"({{{{ and }}}}); its fields are {fields}."
        ) from None
    if unknown:
        listed = ", ".join(f"{{{field}}}" for field in unknown)
        raise SettingsError(
            f"`{name}` uses {listed}, but its fields are {fields}. Rename it, or double the braces ({{{{ and }}}}) of "
            "text that is no field."
        )
    if missing := [field for field in needed if field not in used]:
        raise SettingsError(
            f"`{name}` lacks {{{missing[0]}}}, so the teacher would never see it. Its fields are {fields}."
        )


@cache
def _listed(criteria: tuple[str, ...]) -> str:
    return " and ".join(filter(None, (", ".join(criteria[:-1]), *criteria[-1:])))


def _schema(*keys: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {key: {"type": "string"} for key in keys},
        "required": list(keys),
        "additionalProperties": False,
    }


_INSTRUCTION_SYSTEM = "You are a helpful, precise but picky assistant for checking the quality of a given instruction."
_INSTRUCTION_TASK = (
    _PAIR + "We would like you to answer several questions related to the quality of a given instruction.\n\n"
    "1. Why this instruction is not good? First analyze the instruction based on the {instruction_criteria}. "
    "Then analyze why this answer is not good for the given instruction based on the {response_criteria}. "
    "Finally, analyze why this bad instruction leads to a bad answer.\n\n"
    "2. Based on the reason you provided, generate a new and complete instruction that is complex and difficult "
    "to answer directly. Make sure the new instruction is relevant but independent to the original instruction, "
    "which can be answered without knowing the original instruction"
)
_INSTRUCTION_ANSWER = "3. Answer the newly generated instruction as detailed as possible"
_RESPONSE_SYSTEM = (
    "You are a helpful, precise but picky assistant for checking the quality of the answer to a given instruction."
)
_RESPONSE_TASK = (
    _PAIR + "We would like you to answer several questions related to the quality of the answer to the given "
    "instruction.\n\n"
    "1. Why this answer is not good for the given instruction? Analyze based on the {response_criteria}.\n\n"
    "2. Based on the reason you provided, generate a better answer, new and complete, as detailed as possible"
)

PROMPTS: dict[str, Any] = {
    "instruction": ReflectionPrompt(
        system=_INSTRUCTION_SYSTEM,
        user=f"{_INSTRUCTION_TASK}, put the new instruction in the format of [New Instruction] your instruction [End]"
        f"\n\n{_INSTRUCTION_ANSWER}, in the format of [New Answer] your answer [End]",
        tags=("New Instruction", "New Answer"),
    ),
    "response": ReflectionPrompt(
        system=_RESPONSE_SYSTEM,
        user=f"{_RESPONSE_TASK}, in the format of [Better Answer] your answer [End]",
        tags=("Better Answer",),
    ),
    "instruction-json": ReflectionPrompt(
        system=_INSTRUCTION_SYSTEM,
        user=f"{_INSTRUCTION_TASK}.\n\n{_INSTRUCTION_ANSWER}.\n\n"
        'Reply with one JSON object and nothing else. Its keys are "critique" (your answer to 1), "instruction" (the '
        'new instruction of 2) and "response" (the answer of 3); each value is a string.',
        schema=_schema("critique", "instruction", "response"),
    ),
    "response-json": ReflectionPrompt(
        system=_RESPONSE_SYSTEM,
        user=f"{_RESPONSE_TASK}.\n\n"
        'Reply with one JSON object and nothing else. Its keys are "critique" (your answer to 1) and "response" (the '
        "better answer of 2); each value is a string.",
        schema=_schema("critique", "response"),
    ),
    # Figure 4 as meant: printed, it shows the block of Assistant 2 twice
    "judge": JudgePrompt(
        system="You are a helpful and precise assistant for checking the quality of the answer.",
        user="[Question]\n{question}\n\n"
        "[The Start of Assistant 1's Answer]\n{answer_1}\n[The End of Assistant 1's Answer]\n\n"
        "[The Start of Assistant 2's Answer]\n{answer_2}\n[The End of Assistant 2's Answer]\n\n"
        "We would like to request your feedback on the performance of two AI assistants in response to the user "
        "question displayed above.\n"
        "Please rate the helpfulness, relevance, accuracy, level of details of their responses. Each assistant "
        "receives an overall score on a scale of 1 to 10, where a higher score indicates better overall performance.\n"
        "Please first output a single line containing only two values indicating the scores for Assistant 1 and 2, "
        "respectively. The two scores are separated by a space. In the subsequent line, please provide a "
        "comprehensive explanation of your evaluation, avoiding any potential bias and ensuring that the order in "
        "which the responses were presented does not affect your judgment.",
    ),
}
