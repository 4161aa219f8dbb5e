"""HTML reports of datasets and models."""
