"""The network in Haiku. Knows nothing of disks, prompts or notebooks."""
