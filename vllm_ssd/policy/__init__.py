"""Speculation policies: fan-out per accept length, drafts per round, branch budget, and fallback after a miss."""

from vllm_ssd.policy.adaptation import Adaptation
from vllm_ssd.policy.budget import BranchBudget
from vllm_ssd.policy.confidence import Confidence, Draws, confidence_levels, uniform_offsets
from vllm_ssd.policy.fallback import NgramGain, jit_drafts, jit_gain, ngram_drafts
from vllm_ssd.policy.fan_out import MAX_LEARNED_FAN_OUT, FanOut, allocate, survival
from vllm_ssd.policy.probing import draft_grid
from vllm_ssd.policy.saguaro import saguaro

__all__ = [
    "MAX_LEARNED_FAN_OUT",
    "NgramGain",
    "Adaptation",
    "BranchBudget",
    "Confidence",
    "Draws",
    "FanOut",
    "allocate",
    "confidence_levels",
    "draft_grid",
    "jit_drafts",
    "jit_gain",
    "ngram_drafts",
    "saguaro",
    "survival",
    "uniform_offsets",
]
