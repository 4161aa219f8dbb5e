"""A dataset on the disk of this machine, and the order in which a training reads it."""
