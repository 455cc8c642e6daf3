"""The command line: `vllm-ssd doctor`, `drafter`, `key`, `plan`, `pool`, `profile`, `top` and `trace`."""

from vllm_ssd.cli import doctor, drafter, planning, pool, top, trace
from vllm_ssd.cli.base import app

__all__ = ["app", "doctor", "drafter", "planning", "pool", "top", "trace"]
