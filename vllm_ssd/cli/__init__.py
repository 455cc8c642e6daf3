"""The command line: `vllm-ssd doctor`, `plan`, `profile`, `top` and `trace`."""

from vllm_ssd.cli import doctor, planning, top, trace
from vllm_ssd.cli.base import app

__all__ = ["app", "doctor", "planning", "top", "trace"]
