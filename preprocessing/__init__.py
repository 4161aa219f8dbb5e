"""From page scans and labels to a dataset folder. Imports `cluster` only."""
