"""How a teacher is asked, and how its reply is read: the form of such a prompt, checked when it is made."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from ..errors import SettingsError
from ..parsing import Rewrite, is_end_tag, read_json, read_tagged, withheld
from .filling import check_template, filled

INSTRUCTION_CRITERIA = (
    "Complexity of the Topic",
    "Level of Detail Required",
    "Knowledge Required",
    "Ambiguity of the Instruction",
    "Logical Reasoning or Problem-Solving Involved",
)
RESPONSE_CRITERIA = ("Helpfulness", "Relevance", "Accuracy", "Level of Details")

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
        check_template("user", self.user, _FIELDS, needed=("instruction", "response"))
        check_template("input_block", self.input_block, ("input",), needed=("input",))
        check_template("history_block", self.history_block, ("turns",))
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
        user = filled(
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


@cache
def _listed(criteria: tuple[str, ...]) -> str:
    return " and ".join(filter(None, (", ".join(criteria[:-1]), *criteria[-1:])))
