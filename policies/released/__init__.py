"""What published code does where it departs from its paper; each departure is an option with a name.

What such code does to the cache itself, as to round a budget up, a policy asks for by a property of a name that
`kvbench.cache.released` lists.
"""
