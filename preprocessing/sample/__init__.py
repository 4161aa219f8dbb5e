"""Drawn pages in the format of Kaggle, for trials without data."""
