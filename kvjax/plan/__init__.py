"""Plans: will it fit, and how fast at best, for a chip that need not be there."""
