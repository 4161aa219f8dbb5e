"""From a dataset folder to a model folder, and the command line. Imports `cluster` and `preprocessing`."""
