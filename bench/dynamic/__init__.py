"""Precision that moves at run time: a measured ladder, and the controller on bursts."""
