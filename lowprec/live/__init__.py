"""Serves a nested model along its ladder, in this process: precision that moves at run time, wired.

slots    the keys and values of sequences of several lengths that are decoded together
server   continuous batching whose every pass runs at the rung that a controller picks
"""

from lowprec.live.server import Answer, LiveServer, Request, serve

__all__ = ["Answer", "LiveServer", "Request", "serve"]
