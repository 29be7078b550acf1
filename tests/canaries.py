"""Credentials that open nothing: wherever they are met, real ones would have been told."""

STORE_KEYS = {"AWS_ACCESS_KEY_ID": "CANARYKEYID", "AWS_SECRET_ACCESS_KEY": "canary/secret+key"}
"""What a caller may have in the environment, and what nobody may read."""
