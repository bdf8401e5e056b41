"""Records on the disk: written whole or not at all, claimed, sealed, redacted, kept in order.

`files` writes every file of kvbench; `record` says what a record is, `store` which attempt of a cell counts, `claims`
who measures it; `maintenance` looks after the folder, and `redaction` keeps secrets out of what leaves the process.
"""
