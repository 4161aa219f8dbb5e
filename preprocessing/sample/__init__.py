"""Draw synthetic pages in Kaggle's format, to try the package without data."""
