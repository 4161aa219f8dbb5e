"""Label files: one module per form, and `read.read_labels`, which reads all forms."""
