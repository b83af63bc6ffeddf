"""Profiles: the time of a step by kernel family, and its memory."""
