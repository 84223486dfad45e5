"""Calibration: a short fine-tune of a result, of its routers and what else it is told to train.

`prepare` turns a folder and a recipe section into a job, `run` trains it on the process at hand,
and `launched` hands it to several processes.
"""
