"""Published KV-cache policies, one class a file; only the yamls in conf/policy name them."""
