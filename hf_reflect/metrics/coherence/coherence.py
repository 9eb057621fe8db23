"""Coherence of instruction-response pairs, as a module of the `evaluate` library; its card is README.md."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import datasets
import evaluate

from hf_reflect.errors import SettingsError
from hf_reflect.metrics import NullsAllowed, rows_of

_CITATION = """\
@inproceedings{reimers2019sentence,
    title={Sentence-BERT: Sentence Embeddings using Siamese BERT-Networks},
    author={Reimers, Nils and Gurevych, Iryna},
    booktitle={Proceedings of the 2019 Conference on Empirical Methods in Natural Language Processing},
    year={2019},
    url={https://arxiv.org/abs/1908.10084}
}
@article{li2023reflection,
    title={Reflection-Tuning: Data Recycling Improves LLM Instruction-Tuning},
    author={Li, Ming and Chen, Lichang and Chen, Jiuhai and He, Shwai and Huang, Heng and Gu, Jiuxiang and
        Zhou, Tianyi},
    journal={arXiv preprint arXiv:2310.11716},
    year={2023}
}
"""

_DESCRIPTION = """\
Coherence says how near an instruction and its response lie to each other in meaning: the cosine of their embeddings
by a Sentence-BERT model. 1 is the same direction, 0 is unrelated.
"""

_KWARGS_DESCRIPTION = """
Args:
    instructions (list of str): what is asked.
    responses (list of str): the answer to each. A pair in which a text is None is not scored.
    inputs (list of str): context of each instruction, "" or None where there is none; may be left out. The encoder
        reads instruction and input as one text, with a line feed between them.
    model_id (str): the encoder, its id on the Hub or a folder. Defaults to sentence-transformers/all-MiniLM-L6-v2.
    model: instead of `model_id`, a loaded `SentenceTransformer`, used where it lies.
    device (str): where the encoder of `model_id` runs. Defaults to an accelerator if there is one.
Returns:
    coherence (list of float): one value a pair, None where it cannot be scored.
    mean_coherence (float): over the values that are there; None where there are none.
    scored (int): pairs that have a value.
Examples:
    >>> from importlib.resources import files
    >>> import evaluate
    >>> coherence = evaluate.load(str(files("hf_reflect") / "metrics" / "coherence"))
    >>> results = coherence.compute(
    ...     instructions=["Name three rivers of Europe.", "Fast."],
    ...     responses=["The Danube, the Rhine and the Loire.", "Fast."],
    ... )
    >>> round(results["coherence"][1], 4)
    1.0
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class Coherence(NullsAllowed, evaluate.Metric):
    """Source: arXiv 2310.11716, Table 3, and arXiv 2402.10110, Table 6."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            module_type="metric",
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"instructions": datasets.Value("string"), "responses": datasets.Value("string")}
            ),
            codebase_urls=["https://github.com/huggingface/sentence-transformers"],
            reference_urls=["https://arxiv.org/abs/1908.10084", "https://arxiv.org/abs/2310.11716"],
        )

    def _compute(
        self,
        instructions: Sequence[str | None],
        responses: Sequence[str | None],
        inputs: Sequence[str | None] | None = None,
        model_id: str = "sentence-transformers/all-MiniLM-L6-v2",
        model: Any = None,
        device: str | None = None,
    ) -> dict[str, Any]:
        import torch

        from hf_reflect.scoring.coherence import coherence_of, load_encoder

        rows = rows_of(instructions, responses, inputs)
        if model is not None and device is not None:
            raise SettingsError("`device` goes with `model_id`; move a loaded model yourself: `model.to(device)`.")
        place = device or (torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
        values = coherence_of(load_encoder(model_id if model is None else model, str(place)), rows)
        there = [value for value in values if value is not None]
        return {"coherence": values, "mean_coherence": fmean(there) if there else None, "scored": len(there)}
