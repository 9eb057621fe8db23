"""How a teacher's reply is read: what a careful reader would take of it, to the character, or nothing with a reason.

A reply has one of two forms, sections behind tags (`[Better Answer] … [End]`) or a JSON object. In either:

- Thinking, and tokens that should have ended the reply, are no part of it (`reply`).
- Tags are read as models write them: in any case, bold, as headings, with colons, in other brackets (`tags`).
- A section opens where its tag opens a line, and ends at an end tag; tags that are talked about, or quoted in code, do
  neither. What could be read in two ways is not read (`sections`).
- The teacher's words about its rewrite are cut off before and behind it; refusals and placeholders are none (`words`).

All of it takes linear time on any text: what is searched for again and again is bounded, and quantifiers that could
fight over the same characters are possessive. Searches that find nothing in most replies begin with a character that
most replies lack.
"""

import json
import re
from functools import cache
from itertools import chain
from operator import attrgetter
from typing import Any, NamedTuple

from .plain import as_asked
from .reply import WHITE, Blocks, Unreadable, json_objects, said, shortened, spoken, strip, whole
from .sections import MOST_OPENINGS, openings, section, the_one
from .tags import bare, bracketed, ending
from .words import folded, is_placeholder, is_refusal, without_preamble, without_sign_off

_PARTS = ("instruction", "response")
# finish reasons of replies that are not whole, as endpoints and gateways name them; any other is taken for an end
_CUT_OFF = {
    "length",
    "token_limit",
    "max_tokens",
    "max_output_tokens",
    "max_length",
    "model_length",
    "model_context_window_exceeded",
}
_BROKEN_OFF = {"error", "abort", "aborted", "cancelled", "incomplete", "insufficient_system_resource"}
_WITHHELD = {
    "content_filter",
    "content_filtered",
    "safety",
    "refusal",
    "recitation",
    "prohibited_content",
    "blocklist",
}
_WITHHELD |= {"spii", "guardrail_intervened"}


class Rewrite(NamedTuple):
    """A reply, read. Where `error` is set nothing else is, but perhaps the critique."""

    instruction: str | None = None
    response: str | None = None
    critique: str | None = None
    error: str | None = None


def withheld(finish_reason: str | None) -> str | None:
    """The error of a reply that is not whole, whatever its text; None where it is."""
    reason = (finish_reason or "").casefold().rpartition(".")[2]
    if reason in _CUT_OFF:
        return "truncated: the reply was cut off at the token limit"
    if reason in _BROKEN_OFF:
        return f"truncated: the endpoint broke the reply off ({finish_reason})"
    if reason in _WITHHELD:
        return "refused: the endpoint's content filter withheld the reply"
    return None


def read_tagged(text: str, tags: tuple[str, ...], end: str = "End", asked: str = "") -> Rewrite:
    """Read `[tag] text [end]` for one tag (the response) or two (instruction, response).

    `asked` is the prompt's own text: what stands in its tags is a placeholder where it comes back.
    """
    text = spoken(
        text,
        lambda rest: all(bracketed(tag).search(rest) or bare(tag).search(rest) for tag in tags),
        lambda before: any(bracketed(tag).search(before) for tag in tags),
    )
    critique = None
    samples = _samples(asked, tags, end)
    try:
        chosen = as_asked(text, tags, end)
        if chosen is None:
            blocks = Blocks(text)
            found = {tag: openings(text, blocks, tag) for tag in tags}
            if missing := [f"[{tag}]" for tag in tags if not found[tag]]:
                return _nothing(" and ".join(missing), text)
            places = sorted(chain.from_iterable(found.values()), key=attrgetter("start"))
            critique = strip(text[: places[0].start]) or None
            if repeated := [tag for tag in tags if len(found[tag]) > MOST_OPENINGS]:
                raise Unreadable(f"unparsed: [{repeated[0]}] opens more than one section")
            stops = [place.start for place in places[1:]] + [len(text)]
            sections = [section(text, place, stop, tags, end) for place, stop in zip(places, stops, strict=True)]
            chosen = [
                the_one(tag, [one for one in sections if one.tag == tag], shown)
                for tag, shown in zip(tags, samples, strict=True)
            ]
        first = min([one.start for one in chosen])
        if chosen[0].start > first and not all(one.closed for one in chosen):
            raise Unreadable(f"unparsed: [{tags[1]}] comes before [{tags[0]}], and one of them has no [{end}]")
        critique = strip(text[:first]) or None
        texts = {
            part: _rewritten(part, one.text, f"[{tag}]", shown)
            for part, tag, one, shown in zip(_PARTS[-len(tags) :], tags, chosen, samples, strict=True)
        }
    except Unreadable as unreadable:
        return Rewrite(critique=critique, error=str(unreadable))
    return Rewrite(critique=critique, **texts)


def read_json(text: str, keys: tuple[str, ...]) -> Rewrite:
    """Read a JSON object with these keys, ("response",) or ("instruction", "response"), and perhaps "critique"."""
    text = spoken(
        text,
        lambda rest: all(f'"{key}"' in rest for key in keys),
        lambda before: any(f'"{key}"' in before for key in keys),
        lambda text: text.lstrip(WHITE + "`json[").startswith("{"),
    )
    found: dict[str, Any] | None = None
    for candidate in json_objects(text, keys):
        named = {key.casefold(): value for key, value in candidate.items()}
        if isinstance(named.get("refusal"), str) and named["refusal"].strip() and not named.get(keys[-1]):
            return Rewrite(error=f"refused: {shortened(whole(named['refusal']))}")
        if any(key in named for key in keys):
            if found is not None and any(found.get(key) != named.get(key) for key in keys):
                return Rewrite(error="unparsed: more than one JSON object in the reply")
            found = named
    if found is None:
        return _nothing("JSON object with " + " and ".join(f"`{key}`" for key in keys), text)
    critique = found.get("critique") or ""
    if not isinstance(critique, str):  # criterion by criterion
        critique = json.dumps(critique, ensure_ascii=False)
    critique = strip(said(critique)) or None
    texts = {}
    try:
        for key in keys:
            if key not in found:
                raise Unreadable(f"unparsed: the JSON object has no `{key}`")
            if not isinstance(found[key], str):
                raise Unreadable(f"unparsed: `{key}` is of type {type(found[key]).__name__}, not text")
            texts[key] = _rewritten(key, strip(said(found[key]).replace("\r\n", "\n")), f"`{key}`")
    except Unreadable as unreadable:
        return Rewrite(critique=critique, error=str(unreadable))
    return Rewrite(critique=critique, **texts)


def is_end_tag(tag: str) -> bool:
    """Whether `[tag]` would be read as the end of a section under any prompt."""
    return ending("End", ()).fullmatch(f"[{tag}]") is not None


@cache
def _samples(asked: str, tags: tuple[str, ...], end: str) -> list[frozenset[str]]:
    """The words that the prompt itself shows in each tag, folded: `[Better Answer] your answer [End]`."""
    forms = [rf"{bracketed(tag).pattern}(.{{1,80}}?)\[{re.escape(end)}\]" for tag in tags]
    return [frozenset(folded(words) for words in re.findall(form, asked[:20_000])) for form in forms]


def _nothing(wanted: str, text: str) -> Rewrite:
    """What is read of a reply without what was wanted."""
    if is_refusal(text.strip()):
        return Rewrite(error=f"refused: {shortened(text)}")
    return Rewrite(error=f"unparsed: no {wanted} in the reply: {shortened(text) or 'it is empty'}")


def _rewritten(part: str, text: str, name: str, samples: frozenset[str] = frozenset()) -> str:
    """The instruction or response without what the teacher says about it; Unreadable where nothing usable is left."""
    text = without_sign_off(without_preamble(text, part), part)
    if not text:
        raise Unreadable(f"unparsed: nothing stands behind {name}")
    if is_placeholder(text, samples):
        raise Unreadable(f"placeholder: {name} holds only {text!r}")
    if len(text) < 400 and is_refusal(text, part):
        raise Unreadable(f"refused: {shortened(text)}")
    return text
