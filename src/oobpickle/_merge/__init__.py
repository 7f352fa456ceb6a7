"""Map and reduce on the workers of somebody else's engine."""
