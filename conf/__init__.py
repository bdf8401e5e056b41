"""The configuration, loaded as pkg://kvbench.conf."""
