"""What a tuned model is worth: questions, answers, and the comparisons that both papers make.

questions.py      the papers' five test sets, or your own
generation.py     a model's answers to them, on any number of processes or through an endpoint
answers.py        files of answers, matched question by question
mt_bench.py       two turns and a grade, in FastChat's files
alpaca_eval.py    outputs for the alpaca-eval package, and what its annotations come to
leaderboard.py    the four benchmarks of the Open LLM Leaderboard, by lm-eval
human_study.py    a page for raters, and what three of them agree on
experiment.py     several training sets from one table
comparison.py     differences between training sets, with intervals over seeds and questions

Pairs of answers are judged by `hf_reflect.judge`.
"""
