"""The link between a target and its drafter: messages, transports, the drafter's process and its placement."""
