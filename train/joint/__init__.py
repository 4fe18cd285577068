"""Several identities in one training run, over one base in memory."""
