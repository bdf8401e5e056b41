"""Does a results folder hold together? An independent reading of its records, which needs nothing else.

`evidence` reads the records and says what a check is, `audit` lists all checks and shows how they ended; the checks
themselves stand by what they look at: `bookkeeping`, `budgets`, `scoring`, `numbers`, `times`.
"""
