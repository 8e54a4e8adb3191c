"""The `vmamba` command."""
