"""Bytes on disk <-> parameters."""
