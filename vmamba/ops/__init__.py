"""The operator and the routes."""
