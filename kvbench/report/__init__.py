"""Rebuild tables, plots and one page from the records of a results folder; reads files only."""
