"""Serves a nested model along its ladder, in this process: precision that moves at run time, wired.

slots     the keys and values of sequences of several lengths that are decoded together
requests  a request on its way, and those that are decoded together
server    continuous batching whose every pass runs at the rung that a controller picks
from_run  a server of what `lowprec calibrate --ladder` made
"""

from lowprec.live.from_run import serve
from lowprec.live.requests import Request
from lowprec.live.server import Answer, LiveServer

__all__ = ["Answer", "LiveServer", "Request", "serve"]
