"""Verification of exported files in their own runtimes."""
