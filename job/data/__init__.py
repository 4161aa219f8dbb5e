"""A dataset staged on the disk of this machine, and the order in which a training reads its crops."""
