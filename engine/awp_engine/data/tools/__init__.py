"""`awp data`: scans folders for bad files, packs them into shards, verifies shards."""
