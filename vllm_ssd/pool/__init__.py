"""Drafters that Ray places: actors that keep one running each, the agent of a target, and named pools."""
