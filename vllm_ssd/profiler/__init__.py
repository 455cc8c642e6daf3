"""Measure what the planner needs, with real engines on the user's machine."""

from vllm_ssd.profiler.measure import Profiler, ProfilerFailed, Subject

__all__ = ["Profiler", "ProfilerFailed", "Subject"]
