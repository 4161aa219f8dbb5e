"""Label files: a module for each form, and one function over them, `read.read_labels`."""
