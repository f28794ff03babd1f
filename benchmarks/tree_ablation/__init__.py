"""What each part of the trees is worth: kind, bigram table, earlier matches.

`kinds` makes the trees, `prediction` says what they should accept, `measurement` what
they do accept in vLLM, `records` keeps what is done, `page` and `plot` show it;
`python -m benchmarks.tree_ablation`.
"""
