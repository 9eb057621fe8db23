"""The cards of published data and of trained models: what they say, and what of other people's words stays."""

import re

import pytest
import yaml
from markdown_it import MarkdownIt

from hf_reflect.errors import DataError
from hf_reflect.hub.card import dataset_card, write_model_card
from hf_reflect.hub.merging import BEGIN, END, merged_card
from hf_reflect.report.statistics import MEASURES

CONFIGS = [{"config_name": "default", "data_files": "data/*"}]
OURS = f"{BEGIN}\nnew\n{END}"


def metadata_of(card):
    return yaml.safe_load(card.split("---")[1])


def merge(text, **changes):
    arguments = {"title": "T", "section": "new", "absent": {"license": "mit"}, "joined": {"tags": ["a", "b"]}}
    return merged_card(text, **{**arguments, "configs": CONFIGS, **changes})


def numbers(measured=("ifd",), **changes):
    nothing = {"mean": None, "n": 0}
    one = {"rows": 1200, **{name: {"mean": 0.8125, "n": 7} if name in measured else nothing for name in MEASURES}}
    sets = {"original": one, "reflected": one, "selected": one}
    found = {"rows": 1200, "versions": 4800, "sets": sets, "errors": {}, "remarks": {}, "costs": {}}
    return {**found, "rewritten": {"nothing": 0, "instruction": 300, "response": 0, "both": 900}, **changes}


def card(provenance=None, statistics=None, existing=None, columns=("row_id", "ifd")):
    provenance = {"rule": "paper", "teacher": {"model": "big"}, "student": {"model": "small"}, **(provenance or {})}
    columns = {"default": ["messages", *columns], "candidates": list(columns)}
    return dataset_card(existing, "me/data", provenance, statistics or numbers(), columns)


# ---- merging


def test_a_fresh_card_has_a_title_room_for_words_and_our_section():
    made = merge(None)
    assert metadata_of(made) == {"license": "mit", "tags": ["a", "b"], "configs": CONFIGS}
    assert made.index("# T") < made.index("Your own words go here") < made.index(OURS)
    assert merge("") == made


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_words_and_metadata_of_others_stay_to_the_character(newline):
    theirs = newline.join(
        [
            "---",
            "# about the lab",
            "pretty_name:   'Our data'  # spaces stay",
            "tags: [poetry, a]  # goes with its line",
            "configs:",
            "- config_name: default",
            "  data_files: old/*",
            "- config_name: extra",
            "  data_files: extra/*",
            "",
            "# before the licence",
            "license: apache-2.0",
            "language: no",
            "---",
            "",
            "# Ours 🐟",
            "",
            "First.  ",
            f"{BEGIN}",
            "old",
            f"{END}",
            "",
            "---",
            "Last, with --- in it",
        ]
    )
    made = merge(theirs)
    head, tail = theirs.split(BEGIN)[0], theirs.split(END)[1]
    assert made.endswith(tail) and OURS.replace("\n", newline) in made
    for line in head.split(newline):
        if line not in ("tags: [poetry, a]  # goes with its line", "  data_files: old/*"):
            assert line in made.split(newline), line
    found = yaml.safe_load(made.split("---")[1])
    assert found["tags"] == ["poetry", "a", "b"] and found["license"] == "apache-2.0"
    assert found["configs"] == [*CONFIGS, {"config_name": "extra", "data_files": "extra/*"}]
    assert merge(made) == made
    assert (made.count("\r\n") == made.count("\n")) == (newline == "\r\n")


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("# Only words\n", "# Only words\n"),
        ("---\n---\nEmpty metadata\n", "Empty metadata\n"),
        ("---\n{pretty_name: x, tags: y}\n---\nOn one line\n", "On one line\n"),
        ("\ufeff---\npretty_name: x\n---\nA mark at the head\n", "A mark at the head\n"),
        ("---\npretty_name: x\ntags: &t [q]\nother: *t\n---\nAliases\n", "Aliases\n"),
        ("---\nlicense:\ntags:\n---\nNothing said\n", "Nothing said\n"),
        ("---\npretty_name: |\n  a\n  b\nlicense: >\n  mit\n---\nBlocks\n", "Blocks\n"),
    ],
)
def test_any_card_can_be_merged_and_merged_again(text, kept):
    made = merge(text)
    assert kept.strip() in made and made.count(OURS) == 1
    found = metadata_of(made)
    assert found["configs"] == CONFIGS and found["tags"][-2:] == ["a", "b"]
    assert found["license"].strip() == "mit"
    assert "pretty_name" not in text or found["pretty_name"].strip() in ("x", "a\nb")
    assert merge(made) == made


@pytest.mark.parametrize(
    "body", [f"{BEGIN}\nx", f"x\n{END}", f"{END}\n{BEGIN}", f"{BEGIN}{BEGIN}{END}", f"{BEGIN}{END}{BEGIN}{END}"]
)
def test_broken_markers_are_an_error_that_says_how_to_mend_them(body):
    with pytest.raises(DataError, match="There must be one of each, in this order, or none: mend them, or delete"):
        merge(f"# Mine\n{body}\n")


@pytest.mark.parametrize(
    ("metadata", "said"),
    [("a: [1", "is no YAML"), ("- a\n- b", "is a list, not"), ("configs: 3", "`configs` in the metadata")],
)
def test_broken_metadata_is_an_error(metadata, said):
    with pytest.raises(DataError, match=said):
        merge(f"---\n{metadata}\n---\n")


def test_what_was_written_before_is_replaced_and_what_was_changed_since_stays():
    before = {"license": "mit", "license_name": "x", "language": "en", "size_categories": ["n<1K"]}
    text = "---\nlicense: mit  # ours\nlicense_name: x\nlanguage: fr\n# theirs\nmine: 1\n---\n"
    absent = {"license": "cc0-1.0", "license_name": None, "language": "de", "size_categories": ["1K<n<10K"]}
    made = merge(text, absent=absent, written=before, joined={})
    wanted = {"license": "cc0-1.0", "language": "fr", "mine": 1, "size_categories": ["1K<n<10K"], "configs": CONFIGS}
    assert metadata_of(made) == wanted and "# theirs\nmine: 1\n" in made
    assert merge(made, absent=absent, written=absent, joined={}) == made


@pytest.mark.parametrize(
    ("info", "left"),
    [
        ("\n  config_name: default\n  features: []", None),
        ("\n  features: []", None),
        ("\n- config_name: default\n  features: []", None),
        ("\n- config_name: extra\n  x: 1\n- config_name: default\n  x: 2", [{"config_name": "extra", "x": 1}]),
        ("\n  config_name: extra\n  x: 1", {"config_name": "extra", "x": 1}),
    ],
)
def test_what_the_card_tells_of_files_that_were_replaced_goes(info, left):
    made = metadata_of(merge(f"---\nmine: 1\ndataset_info:{info}\nlast: 2\n---\n# Words\n"))
    assert made.get("dataset_info") == left and (made["mine"], made["last"]) == (1, 2)


def test_a_card_that_somebody_gave_another_licence_is_an_error_that_names_both():
    with pytest.raises(DataError, match="says `license: mit`, and the provenance says 'cc-by-4.0'"):
        card({"license": "cc-by-4.0"}, existing="---\nlicense: MIT\n---\n")
    for there in ("license: CC-BY-4.0", "license: [mit, cc-by-4.0]", "license:"):
        card({"license": "cc-by-4.0"}, existing=f"---\n{there}\n---\n")


# ---- what a dataset's card says


@pytest.mark.parametrize(
    ("provenance", "said", "unsaid"),
    [
        ({"rule": "paper"}, "small scored every version, and 1,200 rows were kept", "came with"),
        ({"rule": "fit", "rescore": True}, "small scored every version", "came with"),
        ({"rule": "ifd", "rescore": False}, "`ifd`: the scores that came with the candidates chose.", "small scored"),
        ({"rule": "coherence"}, "the coherence of every version was measured, and 1,200 rows", "small scored"),
        ({"rule": "random"}, "by the rule `random`, which needs no scores.", "small scored"),
        ({"rule": "longest", "rescore": False}, "by the rule `longest`, which needs no scores.", "came with"),
    ],
)
def test_the_card_says_who_scored(provenance, said, unsaid):
    made = card(provenance).split("## Load it")[0]
    assert said in made and unsaid not in made
    assert "with their scores" in made and "with their scores" not in card(provenance, columns=("row_id",))


def test_the_card_shows_the_numbers_of_the_statistics():
    made = card(statistics=numbers(errors={"refused": 1234, "truncated": 5}, remarks={"check": 6}))
    for line in (
        "| | original | fully reflected | selected |",
        "| rows | 1,200 | 1,200 | 1,200 |",
        "| IFD (of perplexities) | 0.812 (n 7) | 0.812 (n 7) | 0.812 (n 7) |",
        "| both | 900 | 75% |",
        "| refused | 1,234 |",
    ):
        assert line in made.splitlines(), line
    assert "coherence |" not in made.split("## Columns")[0]  # nobody measured it
    assert "check 6." in made and 'load_dataset("me/data", "candidates"' in made
    assert "python -m hf_reflect.hub verify me/data" in made and "2310.11716" in made and "2402.10110" in made
    assert metadata_of(made)["size_categories"] == ["1K<n<10K"]


def test_a_licence_that_the_hub_has_no_word_for_is_named():
    assert metadata_of(card({"license": "CC-BY-4.0"}))["license"] == "cc-by-4.0"
    found = metadata_of(card({"license": "Research only, ask us"}))
    assert (found["license"], found["license_name"]) == ("other", "Research only, ask us")
    assert "license" not in metadata_of(card())


def test_names_from_the_data_are_shown_and_do_nothing_else():
    evil = "a|b <script>alert(1)</script> [x](javascript:1) `c` *d* \n\n# e <!-- hf_reflect:end --> {{ rule }} &amp;"
    provenance = {name: evil for name in ("teacher", "student", "source_dataset", "teacher_terms", "license", "note")}
    made = card({**provenance, "rule": evil, "teacher_models": [evil]}, numbers(errors={evil: 1}), columns=(evil,))
    assert made.count(END) == 1 and merged_card(made, "T", "x", {}, {}).count(BEGIN) == 1
    html = MarkdownIt("commonmark").enable("table").render(made.split("---\n", 2)[2])
    assert "<script" not in html and 'javascript:1"' not in html and "<h1> e" not in html
    shown = (
        "a|b &lt;script&gt;alert(1)&lt;/script&gt; [x](javascript:1) `c` *d* # e &lt;!-- hf_reflect:end --&gt; {{ rule"
    )
    assert shown in html
    rows = [row for row in html.split("<tr>") if "terms" in row]
    assert [row.count("<td") for row in rows] == [2]


def test_addresses_and_datasets_of_the_hub_become_links():
    made = card({"source_dataset": "someone/data_1", "teacher_terms": "https://example.org/terms_of_use?a=1"})
    html = MarkdownIt("commonmark").enable("table").render(made.split("---\n", 2)[2])
    assert '<a href="https://huggingface.co/datasets/someone/data_1">someone/data_1</a>' in html
    assert '<a href="https://example.org/terms_of_use?a=1">' in html
    assert metadata_of(made)["source_datasets"] == ["someone/data_1"]


# ---- a model's card


PROVENANCE = {
    "teacher": {"model": "big"},
    "source_dataset": "someone/data",
    "rule": "paper",
    "ifd_gate": 1.0,
    "counts": {"selected": {"rows": 2345}},
    "versions": {"trl": "1.16.0"},
}


def test_a_model_s_card_names_what_it_was_made_from(tmp_path):
    path = write_model_card(tmp_path / "model", PROVENANCE, "org/base", "me/recycled", "recipes/srecycle_alpaca.yaml")
    made = path.read_text()
    found = metadata_of(made)
    assert (found["base_model"], found["datasets"]) == ("org/base", ["me/recycled"])
    assert found["library_name"] == "transformers" and "hf_reflect" in found["tags"]
    for line in ("| recipe | srecycle\\_alpaca.yaml |", "| rows trained on | 2345 |", "| with | trl 1.16.0 |"):
        assert line in made.splitlines(), line
    assert "| rule | paper, ifd\\_gate 1.0 |" in made


@pytest.mark.parametrize(
    ("provenance", "said"),
    [
        ({}, "by Selective Reflection-Tuning: big rewrote.*, and the student chose what to train on\\. "),
        ({"rescore": False}, "by Reflection-Tuning: .*, and the scores that came with the candidates chose what"),
        ({"rule": "random"}, "by Reflection-Tuning: .*, and the rule `random` chose what to train on\\. "),
        ({"rule": None}, "by Reflection-Tuning: big rewrote the data of [^,]*\\. The data"),
    ],
)
def test_a_model_s_card_says_who_chose(tmp_path, provenance, said):
    made = write_model_card(tmp_path / "model", PROVENANCE | provenance, "org/base").read_text()
    assert re.search(said, made)


def test_a_model_s_card_keeps_what_trl_wrote(tmp_path):
    (tmp_path / "README.md").write_text(
        "---\nbase_model: org/base\nlibrary_name: transformers\ntags:\n- generated_from_trainer\n- sft\n"
        "licence: license\n---\n\n# Model Card for x\n\nTrained with SFT.\n"
    )
    for _ in range(2):
        made = write_model_card(tmp_path, PROVENANCE, "org/base", "me/recycled").read_text()
    assert "# Model Card for x\n\nTrained with SFT.\n" in made and made.count(BEGIN) == 1
    assert metadata_of(made)["tags"] == ["generated_from_trainer", "sft", "hf_reflect", "reflection-tuning", "trl"]


def test_local_folders_are_called_by_their_names_only(tmp_path):
    base = tmp_path / "private" / "student"
    base.mkdir(parents=True)
    made = write_model_card(tmp_path / "model", PROVENANCE, str(base), str(tmp_path / "private" / "rows")).read_text()
    assert "base_model" not in metadata_of(made) and "datasets" not in metadata_of(made)
    assert "student was fine-tuned on rows" in made and "private" not in made


def test_a_card_that_is_no_text_is_an_error(tmp_path):
    (tmp_path / "README.md").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not UTF-8"):
        write_model_card(tmp_path, PROVENANCE, "org/base")
