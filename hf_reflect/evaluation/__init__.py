"""What a tuned model is worth: questions, answers, and the comparisons that both papers make.

questions         the papers' five test sets, or your own
generation        a model's answers to them, on any number of processes or through an endpoint
answers           files of answers, matched question by question
mt_bench          two turns and a grade, in FastChat's files
alpaca_eval       outputs for the alpaca-eval package, and what its annotations come to
leaderboard       the four benchmarks of the Open LLM Leaderboard, by lm-eval
human_study       a page for raters, and what three of them agree on
experiment        several training sets from one table
comparison        differences between training sets, with intervals over seeds and questions

Pairs of answers are judged by `hf_reflect.judge`.
"""
