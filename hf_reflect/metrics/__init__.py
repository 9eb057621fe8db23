"""Modules of the `evaluate` library, each loaded by the path of its folder; its README.md is its card.

ifd/        IFD and r-IFD: how hard a pair is for a student, and how well its answer tells what was asked
coherence/  Sentence-BERT cosine of instruction and response
win_rate/   win, tie and lose from a judge's scores in both orders

    evaluate.load(str(importlib.resources.files("hf_reflect") / "metrics" / "ifd"))
"""
