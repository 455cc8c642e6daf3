"""Answer the doctor's questions about machines with GPUs: each line of standard input is one, as JSON.

A process of its own, since vLLM's platform is chosen once.
"""

from __future__ import annotations

import json
import os
import sys

os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}

from vllm_ssd.compat.target.assumed import assume_gpus

GPU_BYTES = 80 << 30
assume_gpus(8, GPU_BYTES)

from vllm_ssd.doctor import Machine  # noqa: E402
from vllm_ssd.doctor.examine import examine  # noqa: E402

for line in sys.stdin:
    case = json.loads(line)
    machine = Machine.here(case["gpus"], GPU_BYTES, assumed=True)
    os.environ |= case["environment"]
    found = examine(case["target"], case["drafter"], case["flags"], machine)
    for name in case["environment"]:
        del os.environ[name]
    print(json.dumps(found.as_json()), flush=True)
