"""Between a target and its drafter: messages, the socket that carries them, the drafter's process and its place."""
