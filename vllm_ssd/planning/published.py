"""Published measurements of the 70B/1B pair on 4 + 1 H100, as a profile that the simulator is tested against.

An independent reproduction with the authors' code (Llama-3.1-70B with tensor parallelism 4, Llama-3.2-1B; greedy; stock
speculation at K = 6, SSD at K = 7 with 3 branches for each accept length): docs/theory.md, Published numbers.
"""

from __future__ import annotations

from vllm_ssd.planning.prior import COMPUTE_EFFICIENCY, DEVICES
from vllm_ssd.planning.profile import Acceptance, Costs, Profile
from vllm_ssd.planning.simulator import Scenario

PLAIN_TOKENS_PER_S, SD_TOKENS_PER_S, SSD_TOKENS_PER_S = 67.0, 182.0, 280.0
SSD_BY_BATCH = {1: 286.0, 2: 514.0, 4: 872.0, 8: 1384.0, 16: 1979.0}
VERIFY_MS = {1: 15.01, 2: 15.52, 4: 16.14, 8: 17.60, 16: 20.16}
ACCEPT_PROBS_AFTER_HIT = (0.130, 0.094, 0.070, 0.058, 0.048, 0.042, 0.035, 0.523)
ACCEPTANCE_AFTER_MISS = 0.7875
"""Independent acceptance rate that gives the measured 4.01 tokens per round after a miss."""
SD_ACCEPTANCE = 0.8872
"""The same for stock speculation: 5.03 tokens per round at K = 6."""
HIT_RATE, GLUE_S, SD_STEP_S = 0.88, 2.8e-3, (27.52 - 15.29) / 6 * 1e-3

PUBLISHED_SD = Scenario(method="sd", num_drafts=6)
PUBLISHED_SSD = Scenario(protocol="ask", num_drafts=7, fan_out=3, on_miss="wait", glue_s=GLUE_S)


def published_profile() -> Profile:
    """The pair's profile; draft steps over more than 64 branches are guessed from their operations."""
    survival, chances = 1.0, []
    for prob in ACCEPT_PROBS_AFTER_HIT[:-1]:
        chances.append((survival - prob) / survival)
        survival -= prob
    # A power law through the one measured point (3 candidates miss 12 %) and a guess (1 candidate misses 35 %).
    curve = tuple(1 - (1 - HIT_RATE) * (f / 3) ** -0.97 for f in range(1, 17))
    per_branch_s = 2 * 1.24e9 / (COMPUTE_EFFICIENCY * DEVICES["H100"].flops_per_s)
    steps = tuple((n, SD_STEP_S + max(n - 64, 0) * per_branch_s) for n in (1.0, 64.0, 1536.0))
    return Profile(
        target="Llama-3.1-70B",
        drafter="Llama-3.2-1B",
        costs=Costs(
            verify=tuple((b, m, ms / 1e3) for b, ms in VERIFY_MS.items() for m in (1, 8)),
            draft_step=steps,
            sync_step=((1.0, SD_STEP_S),),
            spread=0.0,
        ),
        acceptance=(Acceptance(tuple(chances), (ACCEPTANCE_AFTER_MISS,), curve, curve, curve, rounds=1000),),
        target_devices=4,
        guessed=("draft steps over more than 64 branches", "coverage for other than 3 candidates"),
    )


def published_sd_acceptance() -> Acceptance:
    """Acceptance of stock speculation in that run."""
    curve = published_profile().acceptance[0].rejected
    return Acceptance((SD_ACCEPTANCE,), (SD_ACCEPTANCE,), curve, curve, curve, rounds=1000)
