"""Pub/Sub batch inference worker."""
