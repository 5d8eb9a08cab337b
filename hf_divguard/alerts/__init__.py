"""Alerts: events of a run, sent to people. Nothing in here can slow or end training."""
