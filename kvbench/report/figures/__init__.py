"""Figures of a report, made with matplotlib: what is drawn, in which style, for paper or page."""
