"""lm-evaluation-harness over this library: its tasks, answered by a model with a compressed cache.

`model` answers the library's requests, `likelihood` scores continuations, `generation` reads how a task wants
text generated, `results` turns what the library reports into tasks and lines of a record. `model` alone needs
the library (`pip install 'hcache[lm_eval]'`). Gao et al., github.com/EleutherAI/lm-evaluation-harness.
"""
