"""What each choice in training prompt tokens is worth.

`plan` says what is run, `workbench` trains, `examination` judges the outcome, `runs`
keeps finished runs, `page` and `plot` show them; `python -m benchmarks.ablations`.
"""
