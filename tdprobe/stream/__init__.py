"""Rows that leave the hooks, with what is known of the samples and tokens that they belong to."""
