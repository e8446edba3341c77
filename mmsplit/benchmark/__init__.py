"""How fast mmsplit is on this machine, and what limits it."""
