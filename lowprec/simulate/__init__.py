"""Replays traces of arrivals through a server whose step times are a ladder's: what a controller would have done.

traces      who arrives when, with how many tokens: Poisson, bursts, diurnal, CSV
server      continuous batching, event by event
policies    what picks the rung: the controller, a fixed rung, an oracle
compare     all policies on one trace, and what came of it (measure)
study       all of it, from what a user says
"""

from lowprec.simulate.compare import Comparison, compare
from lowprec.simulate.server import Outcome, Server, replay
from lowprec.simulate.study import Load, study
from lowprec.simulate.traces import Lengths, Trace, make_trace, read_trace

__all__ = [
    "Comparison",
    "Lengths",
    "Load",
    "Outcome",
    "Server",
    "Trace",
    "compare",
    "make_trace",
    "read_trace",
    "replay",
    "study",
]
