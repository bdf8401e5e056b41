"""What a policy kept and dropped, sample by sample, replayed, recorded and shown."""
