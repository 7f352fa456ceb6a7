"""The arena: blocks of shared memory, who has them, and how a message gets into them and out.

Knows nothing of pickle."""
