"""Audits: lower bounds on the privacy loss of a training procedure."""
