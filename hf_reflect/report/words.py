"""What the tables say in codes and numbers, said in sentences."""

import math
import re

from ..selection import VARIANTS

NAMES = dict(
    zip(VARIANTS, ("Original", "New instruction", "New response", "New instruction and new response"), strict=True)
)
MEASURES = {
    "ifd": "IFD",
    "r_ifd": "r-IFD",
    "coherence": "coherence",
    "loss_instruction": "loss of instruction",
    "loss_response": "loss of response",
    "loss_instruction_given_response": "loss of instruction given response",
    "loss_response_given_instruction": "loss of response given instruction",
}
CODES = {
    "truncated": "The reply was cut off at the token limit.",
    "refused": "The teacher refused, or the endpoint withheld the reply.",
    "unparsed": "The reply does not have the form that was asked for.",
    "placeholder": "The reply holds the words of the form in place of text.",
    "unchanged": "The text came back as it was.",
    "check": "The rewrite did not pass a check.",
    "teacher": "The request failed for good; another run may get it.",
    "budget": "The budget was used up before this was asked.",
    "parent": "What it would have been made from is unusable, so it was not asked for.",
    "unknown": "A text is missing, and no reason stands beside it.",
    "other": "Codes that are rarer than those above.",
}
OUTCOMES = {
    "kept": "Taken for training.",
    "not chosen yet": "No student has chosen among the versions.",
    "not in selected/": "The row is not among the saved ones.",
    "response not reflected": "The version that won has the old response, and only rewritten responses are kept.",
}
RULES = {
    "paper": "the new instruction where its IFD is higher, then the new response where its r-IFD is lower",
    "ifd": "the higher IFD, twice",
    "r_ifd": "the lower r-IFD, twice",
    "coherence": "the higher coherence, twice",
    "perplexity": "the lower loss of the response given the instruction, twice",
    "random": "a coin, twice",
    "instruction": "the new instruction wherever it can be used",
    "response": "the new response wherever it can be used",
    "reflected": "the most rewritten version that can be used",
    "original": "the original, always",
    "longest": "the longest response of all versions",
    "fit": "the version whose response the student finds likeliest",
}
_WON = {
    "original": "the original",
    "instruction": "the new instruction",
    "response": "the new response",
    "instruction+response": "the new instruction with a new response",
}
_FIRST = "the first usable of "
_AMONG = "no usable version among "
_DUEL = re.compile(r"(\w+) (\S+) → (\S+): (\S+) (taken|not taken)")
_DROPPED = re.compile(
    r"(?P<reason>[^:]+): (?P<variant>\S+) won(?: with (?P<score>\w+) (?P<value>\S+))?; (?P<rest>.*)", re.S
)
_GATE = re.compile(r"(ifd|r_ifd) not below (\S+)")
_PLAIN = re.compile(r"(\S+): (the .*)", re.S)


def outcome_in_words(outcome: str) -> str:
    """What a row with this outcome went through, as a sentence."""
    if gate := _GATE.fullmatch(outcome):
        return f"The version that won has no {MEASURES[gate[1]]} below the gate {gate[2]}."
    if outcome.startswith(_AMONG):
        return "None of these has both texts, and the rule takes no other."
    if outcome == "no usable version":
        return "None of its versions that the rule looks at has both texts."
    return OUTCOMES.get(outcome, "")


def outcome_name(outcome: str) -> str:
    """A reason as a label."""
    if gate := _GATE.fullmatch(outcome):
        return f"{MEASURES[gate[1]]} not below {gate[2]}"
    if outcome.startswith(_AMONG):
        return f"no usable version among {_listed(outcome.removeprefix(_AMONG))}"
    return outcome


def why_in_words(why: str, kept: bool) -> str:
    """What `decide` says of a row, as sentences for people."""
    if why.startswith("saved: "):
        return "Kept, since selected/ holds this version. By these settings and scores: " + _small(
            why_in_words(why.removeprefix("saved: "), kept)
        )
    if why.startswith("not in selected/: "):
        rest = _small(why_in_words(why.removeprefix("not in selected/: "), True))
        return f"Not kept: selected/ does not hold this row. By these settings and scores: {rest}"
    if dropped := _DROPPED.fullmatch(why):
        return f"Dropped: {_reason(dropped)}. {_sentence(dropped['rest'])}"
    if why.startswith(_AMONG):
        return f"Dropped: of {_listed(why.removeprefix(_AMONG))}, none has both texts."
    if why.startswith("no usable version"):
        return "Dropped: none of its versions that the rule looks at has both texts."
    if not why:
        return "Kept: selected/ holds this version; the candidates have no scores that would say why." if kept else ""
    return _sentence(why)


def _small(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:] if not sentence.startswith(("IFD", "r-IFD")) else sentence


def _reason(dropped: re.Match) -> str:
    gate = _GATE.fullmatch(dropped["reason"])
    if not gate:
        return f"{_WON[dropped['variant']]} won, but its response was not rewritten"
    name, value = MEASURES[gate[1]], dropped["value"]
    if value in (None, "null"):
        return f"the version that won has no {name}, and the gate asks for one below {gate[2]}"
    return f"{name} {_number(value)} is not below the gate {gate[2]}"


def _sentence(why: str) -> str:
    """The reasons of a winner: up to two duels, or one order."""
    parts = why.split("; ")
    if plain := _PLAIN.fullmatch(why):
        if plain[2].startswith(_FIRST):
            return _first(plain[1], plain[2].removeprefix(_FIRST).split(", "))
        return f"{_capital(_WON[plain[1]])} won: it is {_ordered(plain[2])}."
    # a stage in which nobody stood is left out, so a single part is of the second
    stages = range(2 - len(parts), 2)
    words = "; ".join(_part(part, stage) for part, stage in zip(parts, stages, strict=False))
    return _capital(words) + "."


def _first(variant: str, order: list[str]) -> str:
    """Why this version won by a plain rule: it is the first in an order."""
    if len(order) == 1:
        return f"{_capital(_WON[variant])} won: the rule takes nothing else."
    before = order[: order.index(variant)]
    if not before:
        return f"{_capital(_WON[variant])} won: it is usable, and the rule asks for it first."
    *names, last = (_WON[name].removeprefix("the ") for name in before)
    return f"{_capital(_WON[variant])} won: there is no usable {' or '.join([', '.join(names), last][not names :])}."


def _listed(variants: str) -> str:
    """Variants with commas between, as people list them."""
    *names, last = (_WON.get(name, name) for name in variants.split(", "))
    return f"{', '.join(names)} and {last}" if names else last


def _ordered(rule: str) -> str:
    if rule == "the highest length of response":
        return "the longest response of the row"
    if rule.startswith("the lowest "):
        name = rule.removeprefix("the lowest ")
        return f"the lowest {MEASURES.get(name, name)} of the row"
    return rule


def _part(part: str, stage: int) -> str:
    what = ("instruction", "response")[stage]
    if duel := _DUEL.fullmatch(part):
        measure, old, new, _, verdict = duel.groups()
        ending = f"so the new {what} was taken" if verdict == "taken" else f"so the old {what} stayed"
        return f"{_moved(MEASURES.get(measure, measure), old, new)}, {ending}"
    if part.startswith("a coin"):
        return f"a coin {'chose the new' if part.startswith('a coin chose') else 'kept the old'} {what}"
    alone = part.removesuffix(" stood alone")
    if alone in ("response", "instruction+response") or (stage == 0 and alone == "instruction"):
        return f"the new {what} had nothing to beat, so it was taken"
    return f"there is no usable new {what}, so the old one stayed"


def _moved(name: str, old: str, new: str) -> str:
    """How a score changed."""
    if old == "null" or new == "null":
        who = "neither version has" if old == new else f"only the {'new' if old == 'null' else 'old'} version has"
        return f"{who} {'an' if name == 'IFD' else 'a'} {name}"
    before, after = float(old), float(new)
    if before == after:
        return f"{name} stayed at {_number(old)}"
    places = next(
        (n for n in (2, 3) if _fits(before, n) and _fits(after, n) and f"{before:.{n}f}" != f"{after:.{n}f}"), 4
    )
    return f"{name} {'rose' if after > before else 'fell'} {_number(old, places)} → {_number(new, places)}"


def _number(text: str, places: int | None = None) -> str:
    value = float(text)
    if not math.isfinite(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:.{places or next((n for n in (2, 3) if _fits(value, n)), 4)}f}"


def _fits(value: float, places: int) -> bool:
    """Near a whole number, where gates are, few digits may hide on which side it is."""
    return not math.isfinite(value) or f"{value:.{places}f}" != f"{round(value):.{places}f}" or value == round(value)


def _capital(words: str) -> str:
    return words if words.startswith("r-IFD") else words[:1].upper() + words[1:]


def percent(part: float, whole: float) -> str:
    """A share in whole percents; 100 % and 0 % only where it is all and nothing."""
    share = 100 * part / whole if whole else 0.0
    if 0 < share < 1:
        return "< 1 %"
    return "> 99 %" if 99 < share < 100 else f"{share:.0f} %"
