"""The command line: `vllm-ssd doctor`, `drafter`, `key`, `plan`, `profile`, `top` and `trace`."""

from vllm_ssd.cli import doctor, drafter, planning, top, trace
from vllm_ssd.cli.base import app

__all__ = ["app", "doctor", "drafter", "planning", "top", "trace"]
