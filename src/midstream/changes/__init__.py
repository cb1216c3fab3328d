"""Changes of a run in progress: weights, excluded samples, another batch size or mix.

`midstream.checkpoint.changes.Changes` holds them as data. The files here make a new value of it
(weights.py, excluded.py, adopt.py), or the pipeline that runs with it (running.py, rewrite.py).
"""
