"""AlpacaEval: a model's outputs for the alpaca-eval package, its annotators asked, and what its annotations come to.

answers → write_outputs → annotate (prompts, orders and parsers are the package's) → read_annotations → win rate

Long answers win more often, and models tuned on rewritten answers write long ones: a win rate stands beside the mean
length, and beside the package's length-controlled win rate where that can be had.

`formats` has the outputs of both sides, `annotating` who is asked and how, `results` what comes of it, and `package`
how alpaca-eval itself is reached.
"""

from .annotating import VERSIONS, annotate, is_asked_by_teacher
from .formats import REFERENCES, load_reference, write_outputs
from .results import read_annotations

__all__ = [
    "REFERENCES",
    "VERSIONS",
    "annotate",
    "is_asked_by_teacher",
    "load_reference",
    "read_annotations",
    "write_outputs",
]
