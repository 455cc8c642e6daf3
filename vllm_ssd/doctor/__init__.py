"""`vllm-ssd doctor`: report what a server with SSD would do on a machine, without loading weights.

Builds vLLM's configurations of target and drafter like a server, places the drafter, and simulates their handshake,
with the same code that a server runs.
"""

from vllm_ssd.doctor.findings import Finding, Findings, Status
from vllm_ssd.doctor.machine import Machine

__all__ = ["Finding", "Findings", "Machine", "Status"]
