"""Turn page scans and labels into a dataset folder. Imports from `cluster` only."""
