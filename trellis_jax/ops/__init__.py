"""The op and its implementations."""
