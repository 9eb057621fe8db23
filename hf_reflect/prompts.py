"""What the teacher is asked and how its reply is read: criteria, template and parser side by side.

Texts after arXiv 2402.10110, Figures 4 and 5. Ledger keys hang on them: a changed character asks everything again.
"""

import re
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

INSTRUCTION_CRITERIA = (
    "Complexity of the Topic",
    "Level of Detail Required",
    "Knowledge Required",
    "Ambiguity of the Instruction",
    "Logical Reasoning or Problem-Solving Involved",
)
RESPONSE_CRITERIA = ("Helpfulness", "Relevance", "Accuracy", "Level of Details")

_PAIR = "{history}[Instruction]\n{instruction}\n\n{input}[The Start of Answer]\n{response}\n[The End of Answer]\n\n"


class Rewrite(NamedTuple):
    """A reply, read. Where `error` is set nothing else is, but perhaps the critique."""

    instruction: str | None = None
    response: str | None = None
    critique: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class ReflectionPrompt:
    """How a teacher is asked to rewrite a pair, and how its reply is read.

    `user` is a `str.format` template with `{history}`, `{instruction}`, `{input}`, `{response}`, and, if wanted,
    `{instruction_criteria}` and `{response_criteria}`; history and input bring their own block, or nothing.
    The reply is expected to hold one section a tag, `[tag] text [End]`. With two tags these are the new instruction
    and the answer to it, with one the better answer.

    Source: arXiv 2402.10110, section 3.1.
    """

    system: str
    user: str
    tags: tuple[str, ...]
    instruction_criteria: tuple[str, ...] = INSTRUCTION_CRITERIA
    response_criteria: tuple[str, ...] = RESPONSE_CRITERIA

    def chat(
        self, instruction: str, response: str, input: str = "", history: Iterable[dict[str, str]] = ()
    ) -> list[dict[str, str]]:
        """The messages that ask for a rewrite of this pair."""
        turns = "\n".join(f"{turn['role'].upper()}: {turn['content']}" for turn in history or ())
        user = self.user.format(
            history=f"[The Start of Conversation]\n{turns}\n[The End of Conversation]\n\n" if turns else "",
            instruction=instruction,
            input=f"[The Start of Input]\n{input}\n[The End of Input]\n\n" if input else "",
            response=response,
            instruction_criteria=_listed(self.instruction_criteria),
            response_criteria=_listed(self.response_criteria),
        )
        return [{"role": "system", "content": self.system}, {"role": "user", "content": user}]

    def parse(self, text: str, finish_reason: str | None = "stop") -> Rewrite:
        """Read a reply to the character, or say why it cannot be used; never raises.

        `error` is one of `truncated: …` (the reply hit its token limit), `refused: …`, `unparsed: …` (a section is
        missing or empty), `placeholder: …` (the prompt's own words came back).
        """
        text = _THINKING.sub("", text.replace("\r\n", "\n"), count=1)
        if (stray := _THINKING_END.match(text)) and self._tag_spans(text[stray.end() :]):
            text = text[stray.end() :]  # a chat template kept the opening tag for itself
        if finish_reason == "length":
            return Rewrite(error="truncated: the reply was cut off at the token limit")
        if finish_reason == "content_filter":
            return Rewrite(error="refused: the endpoint's content filter withheld the reply")
        spans = self._tag_spans(text)
        if spans is None:
            if _REFUSAL.match(text.strip()):
                return Rewrite(error=f"refused: {_shortened(text)}")
            found = " and ".join(f"[{tag}]" for tag in self.tags)
            return Rewrite(error=f"unparsed: no {found} in the reply: {_shortened(text) or 'it is empty'}")
        critique = text[: spans[0][0]].strip() or None
        ends = [start for start, _ in spans[1:]] + [len(text)]
        sections = []
        for tag, (_, start), end in zip(self.tags, spans, ends, strict=True):
            again = islice(re.finditer(_OPENS_A_LINE + _tag(tag), text[start:end]), 9)
            if any(not _in_code(text[start:end], match.start()) for match in again):
                return Rewrite(critique=critique, error=f"unparsed: [{tag}] opens more than one section")
            # "Here is a new and more detailed answer:" is the teacher speaking, not the answer
            section = _PREAMBLE.sub("", _until_end_tag(text[start:end]), count=1)
            if not section:
                return Rewrite(critique=critique, error=f"unparsed: nothing stands behind [{tag}]")
            if len(section) < 60 and _PLACEHOLDER.fullmatch(section):
                return Rewrite(critique=critique, error=f"placeholder: [{tag}] holds only {section!r}")
            if len(section) < 400 and _REFUSAL.match(section):
                return Rewrite(critique=critique, error=f"refused: {_shortened(section)}")
            sections.append(section)
        return Rewrite(sections[0] if len(sections) > 1 else None, sections[-1], critique)

    def _tag_spans(self, text: str) -> list[tuple[int, int]] | None:
        """(start, end) of each tag in order, None if one is missing.

        A tag that opens a line is a section's. One amid a sentence is talked about, and counts only where no other is.
        """
        spans: list[tuple[int, int]] = []
        limit = len(text)
        for tag in reversed(self.tags):
            # the first that opens a line, since an answer may quote its tag; else the last of those amid sentences
            found = re.search(_OPENS_A_LINE + _tag(tag), text[:limit])
            if found is None:
                found = next(iter(deque(re.finditer("(?i)[*_]?" + _tag(tag), text[:limit]), maxlen=1)), None)
            if found is None:
                return None
            # what closes a bold tag belongs to it; after a plain one a ** opens the answer
            closing = _BOLD_TAG_END if re.search("[*_]", found.group()) else _TAG_END
            tail = closing.match(text, found.end())
            spans.insert(0, (found.start(), tail.end() if tail else found.end()))
            limit = found.start()
        return spans


def _listed(criteria: tuple[str, ...]) -> str:
    return " and ".join(part for part in (", ".join(criteria[:-1]), criteria[-1]) if part)


# Quantifiers that could fight over the same characters are possessive or bounded: hostile text takes linear time.
_OPENS_A_LINE = r"(?im)^[#>*_ \t]*+(?:(?:\d{1,2}[.)]|[-•])[#>*_ \t]*+)?"
_TAG_END, _BOLD_TAG_END = re.compile("[:：]?"), re.compile("[*_:：]{0,4}")
_END = re.compile(r"(?i)(?:#{1,6} )?[*_#]{0,6}\[[ \t]*+/?[ \t]*+(?:the )?end(?: of [^\]\n]{0,40})?[ \t]*+\][*_]{0,6}")
_LINE_ENDS = re.compile(r"[ \t]*+(?:\n|\Z)")
_FENCE = re.compile(r"(?m)^[ \t]*+```")
_THINKING = re.compile(r"(?is)\A\s*+<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)")
_THINKING_END = re.compile(r"(?is)\A(?:(?!<think).)*?</think(?:ing)?>")
_REFUSAL = re.compile(
    r"(?i)(?:(?:i['’]m|i am) (?:very |so |truly )?sorry|sorry|i apologi[sz]e|unfortunately)?[,.!]? ?(?:but )?"
    r"(?:as an ai[^.\n]{0,60}?, )?(?:i(?:['’]m| am) (?:unable|not able) to|"
    r"i (?:can(?:['’]t|not| not)|won['’]t|will not)) (?:\w+ ){0,2}?"
    r"(?:help(?! but)|assist|answer|provide|comply|fulfil|fulfill|complete|do that|do this|generate|create|write|"
    r"rewrite|continue|discuss|engage|support)\b"
)
_PLACEHOLDER = re.compile(
    r"(?i)[\W_]*(?:(?:your|the|my|insert)?[ ]?(?:new |better |own )?(?:instruction|answer)(?: here)?|n/?a|none|tbd)?"
    r"[\W_]*"
)
_PREAMBLE = re.compile(
    r"(?i)\A(?:(?:sure|certainly|of course)[,.!:]? )?[*_]{0,3}"
    r"(?:(?:here(?: is|['’]s)|below is|this is) (?:(?:a|an|the|my|your) )?"
    r"(?:(?:and|much|very|more|new|better|best|improved|revised|updated|enhanced|detailed|complete|complex|"
    r"challenging|comprehensive|thorough|accurate|helpful|possible),? ){1,8}(?:version of the )?"
    r"(?:answer|response|instruction)"
    r"(?: to (?:the|your|this) (?:given |original |new |above )?(?:instruction|question|prompt))?"
    r"|(?:new|better|improved|revised) (?:answer|response|instruction))[*_]{0,3}:[*_]{0,3}(?:\s++|\Z)"
)


def _tag(tag: str) -> str:
    return r"\[[ \t]*+" + r"[ \t]+".join(map(re.escape, tag.split())) + r"[ \t]*+\]"


def _code_blocks(section: str) -> list[tuple[int, int]]:
    """Where fenced code stands; a last fence without a partner opens none."""
    fences = [match.start() for match in _FENCE.finditer(section)]
    return list(zip(fences[::2], fences[1::2], strict=False))


def _in_code(section: str, place: int) -> bool:
    return any(start < place < end for start, end in _code_blocks(section))


def _until_end_tag(section: str) -> str:
    """The text up to its [End]; all of it where there is none.

    Of several outside code blocks the last that closes its line, else the last; of ends in a row the first.
    """
    blocks = deque(_code_blocks(section))
    last = closing = None
    closing_end = 0
    for match in _END.finditer(section):
        while blocks and blocks[0][1] < match.start():
            blocks.popleft()
        if blocks and blocks[0][0] < match.start():
            continue
        last = match.start()
        if _LINE_ENDS.match(section, match.end()):
            if closing is None or section[closing_end : match.start()].strip():
                closing = match.start()
            closing_end = match.end()
    return section[: last if closing is None else closing].strip()


def _shortened(text: str, length: int = 100) -> str:
    line = " ".join(text[: 4 * length].split())
    return line if len(line) <= length else line[: length - 1] + "…"


PROMPTS = {
    "instruction": ReflectionPrompt(
        system="You are a helpful, precise but picky assistant for checking the quality of a given instruction.",
        user=_PAIR + "We would like you to answer several questions related to the quality of a given instruction.\n\n"
        "1. Why this instruction is not good? First analyze the instruction based on the {instruction_criteria}. "
        "Then analyze why this answer is not good for the given instruction based on the {response_criteria}. "
        "Finally, analyze why this bad instruction leads to a bad answer.\n\n"
        "2. Based on the reason you provided, generate a new and complete instruction that is complex and difficult "
        "to answer directly. Make sure the new instruction is relevant but independent to the original instruction, "
        "which can be answered without knowing the original instruction, put the new instruction in the format of "
        "[New Instruction] your instruction [End]\n\n"
        "3. Answer the newly generated instruction as detailed as possible, in the format of "
        "[New Answer] your answer [End]",
        tags=("New Instruction", "New Answer"),
    ),
    "response": ReflectionPrompt(
        system="You are a helpful, precise but picky assistant for checking the quality of the answer to a given "
        "instruction.",
        user=_PAIR + "We would like you to answer several questions related to the quality of the answer to the given "
        "instruction.\n\n"
        "1. Why this answer is not good for the given instruction? Analyze based on the {response_criteria}.\n\n"
        "2. Based on the reason you provided, generate a better answer, new and complete, as detailed as possible, in "
        "the format of [Better Answer] your answer [End]",
        tags=("Better Answer",),
    ),
}
