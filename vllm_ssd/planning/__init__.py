"""The planner: predicts tokens per second from measured costs and acceptance.

Only `measure` and the processes it starts use vLLM or do I/O.
"""

from vllm_ssd.planning.outcomes import Recorded, Synthetic
from vllm_ssd.planning.plan import Plan, plan
from vllm_ssd.planning.predict import Prediction, Setting, predict_plain, predict_sd, predict_ssd
from vllm_ssd.planning.prior import DEVICES, Device, Shape, drafter_size_prior, guess_profile
from vllm_ssd.planning.profile import Acceptance, Costs, Profile
from vllm_ssd.planning.simulator import Report, Scenario, Simulation, Workload

__all__ = [
    "DEVICES",
    "Acceptance",
    "Costs",
    "Device",
    "Plan",
    "Prediction",
    "Profile",
    "Recorded",
    "Report",
    "Scenario",
    "Setting",
    "Shape",
    "Simulation",
    "Synthetic",
    "Workload",
    "drafter_size_prior",
    "guess_profile",
    "plan",
    "predict_plain",
    "predict_sd",
    "predict_ssd",
]
