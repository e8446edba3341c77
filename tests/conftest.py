"""Where this file lies is on the path of every test: `from checkpoints import …` finds the helpers beside it."""
