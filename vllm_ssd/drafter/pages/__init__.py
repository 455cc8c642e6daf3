"""KV pages of the drafter's token trees, kept on the host or on the device, behind one protocol."""
