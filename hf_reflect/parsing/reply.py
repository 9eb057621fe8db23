"""What a reply says: its text without thinking and end tokens, where code stands in it, its JSON objects."""

import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import Any


class Unreadable(Exception):
    """Why a reply cannot be used: a code, a colon, the detail. Becomes `Rewrite.error`, and never leaves `parsing`."""


# no-break, zero-width and ideographic spaces stand in for ordinary ones
GAPS = " \t\xa0" + "".join(map(chr, range(0x2000, 0x200E))) + "\u202f\u2060\u3000\ufeff"
WHITE = "".join(chr(code) for code in range(0x3001) if chr(code).isspace()) + "\u200b\u2060\ufeff"


def strip(text: str) -> str:
    """The text without white space around it, invisible characters included."""
    return text.strip(WHITE)


def shortened(text: str, length: int = 100) -> str:
    """The first characters of a text on one line, for an error."""
    line = " ".join(text[: 4 * length].split())
    return line if len(line) <= length else line[: length - 1] + "…"


# blocks of thinking with which a reply begins; the last may never close
_THINKING = re.compile(
    r"(?is)(?:[\s\ufeff]*+[<◁](think(?:ing)?|thought|reasoning|reflection)[>▷].*?(?:[<◁]/\1[>▷]|\Z))++"
)
_THINKING_BEGIN = re.compile(r"(?i)<think")
_THINKING_END = re.compile(r"(?i)(?<![`'\"“‘])</think(?:ing)?>(?![`'\"”’])")
# tokens that should have ended the reply, left in its text; each ends in ">"
_END_TOKENS = re.compile(
    r"(?:\s*+(?:<\|(?:im_end|eot_id|end|return|endoftext|end_of_text|eom_id)\|>|<｜end▁of▁sentence｜>|<end_of_turn>|<eos>|</s>))++\s*\Z"
)


def spoken(
    text: str,
    is_whole: Callable[[str], bool],
    has_begun: Callable[[str], bool],
    is_reply: Callable[[str], bool] = lambda text: False,
) -> str:
    """The reply with plain line ends, without thinking and without the tokens that should have ended it.

    Thinking stands first, or on lines of its own before anything of the reply: where it closes (without an opening
    tag too, which a chat template may have kept), the whole reply is still to come.
    """
    if "\r" in text:
        text = text.replace("\r\n", "\n")
    if "<" not in text and "◁" not in text:  # as most: all that is looked for begins with one of them
        return text
    if thinking := _THINKING.match(text):
        text = text[thinking.end() :]
    closing = _THINKING_END.search(text) if "<" in text and not is_reply(text) else None
    if closing and is_whole(text[closing.end() :]):
        opening = _THINKING_BEGIN.search(text, 0, closing.start())
        begin = opening.start() if opening else 0
        opens_a_line = not text[max(text.rfind("\n", 0, begin), 0) : begin].strip()
        if opens_a_line and not has_begun(text[:begin]):
            text = text[:begin] + text[closing.end() :]
    if text.rstrip().endswith(">"):
        tokens = _END_TOKENS.search(text, max(0, len(text) - 200))
        if tokens and not ("</s>" in tokens.group() and "<s>" in text):  # struck out in HTML
            text = text[: tokens.start()]
    return text


# with the rest of its line; most code stands in backticks, and to look for them alone takes a fifth
_FENCE, _TICKS = re.compile(r"(```+|~~~+)(.*)"), re.compile(r"(```+)(.*)")


class Blocks:
    """Where fenced code stands in a text. A last fence without a partner opens no block."""

    def __init__(self, text: str):
        self.starts: list[int] = []
        self.stops: list[int] = []
        self.unpaired: int | None = None  # where a last bare fence stands
        if "`" not in text and "~" not in text:
            return
        opened: tuple[int, str] | None = None
        for fence in (_FENCE if "~" in text else _TICKS).finditer(text):
            line = text.rfind("\n", 0, fence.start()) + 1
            if line < fence.start() and text[line : fence.start()].strip(GAPS + ">"):
                continue  # amid its line
            mark, info = fence.groups()
            if opened is None:
                opened = (line, mark)
                self.unpaired = line if not info.strip() else None
            elif mark.startswith(opened[1]) and not info.strip():
                self.starts.append(opened[0])
                self.stops.append(fence.end())
                opened = self.unpaired = None

    def hold(self, place: int) -> bool:
        """Whether this place in the text is inside a block."""
        block = bisect_right(self.starts, place) - 1
        return block >= 0 and place < self.stops[block]


def whole(text: str) -> str:
    """The text with a question mark for each half of a surrogate pair, which neither SQLite nor Arrow takes."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


# what becomes of LaTeX whose backslashes were not doubled: of `\frac` a form feed and "rac"
_EATEN = {"\b": r"\b", "\f": r"\f", "\t": r"\t", "\r": r"\r", "\n": r"\n"}
_LATEX = re.compile(
    r"\f(?=rac\b|rac\d|orall)|\x08(?=oxed|eta(?![a-z])|egin\{|inom|ullet|igl?[(\[{]|ar\{|mod(?![a-z]))"
    r"|\t(?=(?:imes|heta|riangle|herefore|ilde)(?![a-z])|(?:ext|frac|ext(?:bf|it|rm))\{)"
    r"|\r(?=(?:ho|ightarrow|angle|ceil|floor)(?![a-z])|ight[)\]|}.\\])|\n(?=(?:abla|otin)(?![a-z]))"
)


def said(value: str) -> str:
    """A string of a JSON object as its writer meant it."""
    return _LATEX.sub(lambda eaten: _EATEN[eaten.group()], whole(value))


_OBJECT = re.compile(r"\{\s*+[\"}]")
_MOST_FAILURES, _MOST_OBJECTS = 50, 1000


def json_objects(text: str, keys: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The objects in a text, outermost first; inner ones only where the outer has none of the keys (`{"result": …}`).

    Attempts are numbered and what they read is summed up, so that no text is read more than a few times.
    """
    decoder = json.JSONDecoder(strict=False)  # weak endpoints leave line ends in strings as they are
    place, failures, objects, read = 0, 0, 0, 0
    while failures < _MOST_FAILURES and objects < _MOST_OBJECTS and read <= 3 * len(text):
        if not (found := _OBJECT.search(text, place)):
            return
        place = found.start() + 1
        try:
            value, stop = decoder.raw_decode(text, found.start())
        except json.JSONDecodeError as error:
            failures, read = failures + 1, read + error.pos - found.start()
            continue
        except RecursionError:
            return
        objects, read = objects + 1, read + stop - found.start()
        yield value
        if any(key.casefold() in keys for key in value):
            place = stop
