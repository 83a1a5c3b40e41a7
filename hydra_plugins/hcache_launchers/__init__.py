"""Hydra's own launchers, with one rule more: a job that dies is that job's result, never the sweep's end.

Hydra takes launchers from the namespace `hydra_plugins` only. Its scan leaves out modules that begin with an
underscore, so nothing of Ray or submitit is imported where they aren't used; runners/launchers.py registers
the classes.
"""
