"""Private ridge regression in coordinates fixed by public data: noisy statistics, noisy descent."""
