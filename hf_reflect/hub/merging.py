"""A README that several hands write: ours is what stands between two markers, and a few keys of the metadata."""

import re
from collections.abc import Mapping
from typing import Any

import yaml

from ..errors import DataError

BEGIN, END = "<!-- hf_reflect:begin -->", "<!-- hf_reflect:end -->"
_FRONT = re.compile(r"\A(\ufeff?\s*---[ \t]*\r?\n)(.*?)(^---[ \t]*(?:\r?\n|\Z))", re.DOTALL | re.MULTILINE)
_COMMENTS = re.compile(r"(?:^[ \t]*(?:#.*)?\n)*\Z", re.MULTILINE)  # and empty lines, behind a value
_INVITATION = (
    "*Your own words go here: what stands outside the two markers below, and metadata that you add, stays when this "
    "is written again.*"
)


def merged_card(
    text: str | None,
    title: str,
    section: str,
    absent: Mapping[str, Any],
    joined: Mapping[str, list[str]],
    configs: list[dict[str, Any]] | None = None,
    written: Mapping[str, Any] | None = None,
) -> str:
    """A card with our section and our metadata; all else is as it was, to the character.

    Args:
        text: the card that is there, in either kind of line ends; None or empty for a fresh one.
        title: of a fresh card.
        section: what stands between the markers, in Markdown; at the end of a card that has none.
        absent: metadata that is set where there is none, or what was `written`; None takes the latter away.
        joined: metadata that is a list and gets these members, unless it has them.
        configs: put in the place of those of the same name; others stay, behind them. What `dataset_info` says of
            these goes: it tells of other files.
        written: what `absent` was when this card was written before: who has changed it since keeps it.

    Raises:
        DataError: the markers or the metadata are broken.
    """
    text = text or ""
    newline = "\r\n" if "\r\n" in text else "\n"
    head, metadata, tail, body = "---\n", "", "---\n", text
    if front := _FRONT.match(text):
        head, metadata, tail, body = *front.groups(), text[front.end() :]
    metadata = _with_metadata(metadata.replace("\r\n", "\n"), absent, joined, configs, written or {})
    begin, end = body.find(BEGIN), body.find(END)
    once = 1 if begin >= 0 else 0
    if body.count(BEGIN) != once or body.count(END) != once or begin > end:
        raise DataError(
            f"README.md has {body.count(BEGIN)} of `{BEGIN}` and {body.count(END)} of `{END}`"
            f"{', in the wrong order' if begin > end and once else ''}, so it cannot be told what in it may be "
            "replaced. There must be one of each, in this order, or none: mend them, or delete both with what is "
            "between."
        )
    block = f"{BEGIN}\n{section.strip()}\n{END}"
    if begin >= 0:
        body = body[:begin] + block + body[end + len(END) :]
    elif body.strip():
        body = f"{body.rstrip()}\n\n{block}\n"
    else:
        body = f"\n# {title}\n\n{_INVITATION}\n\n{block}\n"
    return (
        re.sub(r"\r?\n", newline, head + metadata + tail + body)
        if newline == "\r\n"
        else head + metadata + tail + body
    )


def section_of(text: str) -> str:
    """What stands between the markers, whatever the line ends; empty where they are not there."""
    found = re.search(f"{re.escape(BEGIN)}(.*){re.escape(END)}", text, re.DOTALL)
    return found[1].replace("\r\n", "\n").strip() if found else ""


def metadata_of(text: str | None) -> dict[str, Any]:
    """The metadata at the head of a card. DataError where it is broken."""
    front = _FRONT.match(text or "")
    return _mapping(front[2]) if front else {}


def _mapping(text: str) -> dict[str, Any]:
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DataError(f"The metadata at the head of README.md is no YAML: {error}\nMend it on the Hub.") from error
    if found is not None and not isinstance(found, dict):
        raise DataError(
            f"The metadata at the head of README.md is a {type(found).__name__}, not `name: value` lines. Mend it, or "
            "delete it together with the lines `---` around it."
        )
    return found or {}


def _with_metadata(
    text: str,
    absent: Mapping[str, Any],
    joined: Mapping[str, list[str]],
    configs: list[dict[str, Any]] | None,
    written: Mapping[str, Any],
) -> str:
    """The YAML with the keys set that have to be; those that are to be None go."""
    found = _mapping(text)
    ours = [name for name in absent if found.get(name) is None or found[name] == written.get(name)]
    wanted = {name: absent[name] for name in ours}
    for name, members in joined.items():
        there = found.get(name)
        there = there if isinstance(there, list) else [] if there is None else [there]
        wanted[name] = there + [member for member in members if member not in there]
    if configs is not None:
        there = found.get("configs") or []
        names = [config["config_name"] for config in configs]
        if not isinstance(there, list) or not all(isinstance(config, dict) for config in there):
            raise DataError("`configs` in the metadata of README.md is no list of mappings. Mend it, or delete it.")
        wanted["configs"] = configs + [config for config in there if config.get("config_name") not in names]
        if "dataset_info" in found:
            wanted["dataset_info"] = _of_others(found["dataset_info"], names)
    wanted = {name: value for name, value in wanted.items() if found.get(name) != value}
    return _edited(text, found, wanted)


def _of_others(info: Any, names: list[str]) -> Any:
    """`dataset_info` without the entries of these configs; one without a name is of `default`."""
    if isinstance(info, dict):
        return None if info.get("config_name", "default") in names else info
    if not isinstance(info, list):
        return info
    kept = [one for one in info if not isinstance(one, dict) or one.get("config_name", "default") not in names]
    return kept or None


def _edited(text: str, found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """The YAML with these keys set, or gone where they are None; every line of the others stays, comments too."""
    from huggingface_hub.utils import yaml_dump

    node = yaml.compose(text, yaml.SafeLoader)
    edited, left = text if text.strip() else "", dict(wanted)
    for key, value in reversed(node.value if isinstance(node, yaml.MappingNode) else []):  # so that places stay right
        if key.value in left:
            start, end = key.start_mark.index, value.end_mark.index
            if text[end - 1] != "\n":  # within a line, which goes as a whole
                end = text.find("\n", end) + 1 or len(text)
            behind = _COMMENTS.search(text, start, end)
            new = _dumped({key.value: left.pop(key.value)})
            edited = edited[:start] + new + (behind[0] if behind else "") + edited[end:]
    edited += "\n" if edited and not edited.endswith("\n") else ""
    edited += _dumped(left)
    result = {name: value for name, value in (found | wanted).items() if name not in wanted or value is not None}
    try:
        if (yaml.safe_load(edited) or {}) == result:
            return edited
    except yaml.YAMLError:
        pass
    return yaml_dump(result, sort_keys=False)  # written so that no line can be changed alone: {a: 1, b: *x}


def _dumped(values: dict[str, Any]) -> str:
    from huggingface_hub.utils import yaml_dump

    there = {name: value for name, value in values.items() if value is not None}
    return yaml_dump(there, sort_keys=False) if there else ""
