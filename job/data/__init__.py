"""A dataset staged on the disk of this machine, the crops of each batch, and their augmentation."""
