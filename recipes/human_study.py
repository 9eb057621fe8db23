"""A blinded comparison of two models' answers by people: the page that they rate on, then the count of their votes.

    python recipes/human_study.py --ours ours.jsonl --theirs theirs.jsonl     # human_study.yaml holds the rest
    python recipes/human_study.py --stage count --ratings ratings-*.json

Every argument: `--help`. Written into `output_dir`: rating_page.html (for the raters), key.json (not for them),
result.json. Source: arXiv 2402.10110, human study.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_reflect.arguments import parse_arguments
from hf_reflect.errors import SettingsError
from hf_reflect.evaluation.answers import read_answers
from hf_reflect.evaluation.human_study import GUIDANCE, OUTCOMES, TITLE, read_ratings, sample_items, write_study
from hf_reflect.files import write_whole
from hf_reflect.launch import main_of


@dataclass
class StudyArguments:
    """Whose answers are compared, and by whom."""

    stage: str = field(default="page", metadata={"help": "page (for the raters), or count (what they saved)."})
    output_dir: str = field(default="runs/human_study", metadata={"help": "Folder of page, key and result."})
    ours: str | None = field(default=None, metadata={"help": "Answer file of the model under study."})
    theirs: str | None = field(default=None, metadata={"help": "Answer file of the model that it is compared with."})
    per_category: int = field(default=4, metadata={"help": "Questions of each category; all, where it has fewer."})
    seed: int = field(default=0, metadata={"help": "Of the sample, its order, and who is A."})
    title: str = field(default=TITLE, metadata={"help": "Heading of the page."})
    guidance: str = field(default=GUIDANCE, metadata={"help": "What raters are asked to weigh."})
    overwrite: bool = field(default=False, metadata={"help": "Replace another study's page and key."})
    ratings: list[str] = field(default_factory=list, metadata={"help": "Files that the raters saved, one each."})
    partial: str = field(
        default="raise", metadata={"help": "Items that not all raters rated: raise, or drop them for all."}
    )

    def __post_init__(self) -> None:
        if self.stage not in ("page", "count"):
            raise SettingsError(f"`stage` is page or count, not {self.stage!r}.")
        if self.stage == "page" and None in (self.ours, self.theirs):
            raise SettingsError("A page shows two models' answers: name their files with `ours` and `theirs`.")
        if self.stage == "count" and not self.ratings:
            raise SettingsError("Name the files that the raters saved: `--ratings ratings-*.json`.")


def main() -> None:
    (study,) = parse_arguments((StudyArguments,), __file__)
    folder = Path(study.output_dir)
    if study.stage == "page":
        assert study.ours is not None and study.theirs is not None  # the arguments say so
        ours, theirs = read_answers(study.ours), read_answers(study.theirs)
        items = sample_items(ours, theirs, study.per_category, study.seed)
        write_study(items, folder, study.title, study.guidance, study.overwrite)
        categories = len(set(items["category"]))
        print(
            f"\n  {len(items)} item{'s' * (len(items) > 1)} of {categories} categor{'ies' if categories > 1 else 'y'}"
        )
        print(f"  page  {folder / 'rating_page.html'}  send it to the raters: it opens in any browser")
        print(f"  key   {folder / 'key.json'}  keep it: it says which answer is whose\n")
        return
    result = read_ratings(study.ratings, folder / "key.json", study.partial)
    write_whole(folder / "result.json", json.dumps(result, indent=1, ensure_ascii=False))
    print_result(result)
    print(f"  result  {folder / 'result.json'}\n")


def print_result(result: dict[str, Any]) -> None:
    """Wins, ties and losses, by category and by rater; how sure the rate is, and how far the raters agree."""
    print(f"\n  {result['ours'] or 'ours'} against {result['theirs'] or 'theirs'}\n")
    rows = {"majority": result}
    if len(result["by_category"]) > 1:
        rows |= {f"  {category or 'no category'}": counts for category, counts in result["by_category"].items()}
    rows |= {f"rater {rater}": counts for rater, counts in result["by_rater"].items()}
    width = max(map(len, rows))
    print(f"  {'':<{width}}" + "".join(f"{name:>6}" for name in (*OUTCOMES, "rate")))
    for name, counts in rows.items():
        rate = (counts["win"] - counts["lose"]) / sum(counts[outcome] for outcome in OUTCOMES) + 1
        print(f"  {name:<{width}}" + "".join(f"{counts[outcome]:>6}" for outcome in OUTCOMES) + f"{rate:>6.2f}")
    low, high = result["interval"]
    kappa = "undefined: one rater, or all votes alike" if result["kappa"] is None else f"{result['kappa']:.3f}"
    print(f"\n  win rate       {result['win_rate']:.2f}, 95 % interval {low:.2f} to {high:.2f}")
    print(f"  no majority    {result['no_majority']}, counted as {'a tie' if result['no_majority'] == 1 else 'ties'}")
    print(f"  Fleiss' kappa  {kappa}")
    if dropped := len(result["dropped"]):
        print(f"  dropped        {dropped} item{'s' * (dropped > 1)} that not all raters rated")


if __name__ == "__main__":
    main_of(main)
