"""Drafters on Ray: actors that each keep one drafter running, the agent of a target, and named pools."""
