"""`vllm-ssd doctor`: what a server with SSD would do on a machine, asked of the code that decides it, without weights.

Builds vLLM's configuration of target and drafter as a server would, places the drafter, and lets both shake hands.
"""

from vllm_ssd.doctor.findings import Finding, Findings, Status
from vllm_ssd.doctor.machine import Machine

__all__ = ["Finding", "Findings", "Machine", "Status"]
