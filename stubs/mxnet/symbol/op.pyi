"""Holds the functions that are made of operators."""
